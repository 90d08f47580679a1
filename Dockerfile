# syntax=docker/dockerfile:1

FROM golang:1.26-alpine AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
ARG VERSION=dev
RUN CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.version=${VERSION}" -o /sealmq ./cmd/sealmq

FROM alpine:3.22 AS base
RUN adduser -D -H -u 10001 sealmq && install -d -o sealmq -g sealmq -m 0700 /data
COPY --from=build /sealmq /usr/local/bin/sealmq
USER 10001:10001
# Identities of devices, and the hub's own folder with --data, live here.
ENV SEALMQ_HOME=/data
# Where a hub serves its status pages, and the health check asks; listen and send have none.
ENV SEALMQ_HTTP=127.0.0.1:8080
EXPOSE 1883 4000
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s CMD ["sealmq", "health"]
ENTRYPOINT ["sealmq"]
CMD ["help"]

# What docker-compose.yml runs: a folder for the volume of each of its services.
FROM base AS demo
RUN mkdir -m 0700 /data/hub /data/bob /data/alice /data/observer

# The image itself: docker build -t sealmq .
FROM base AS sealmq
VOLUME /data
