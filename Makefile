# sealmq: what to run. `make help` lists it.
SHELL := bash
BINARY := bin/sealmq
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
# How long each fuzz target runs with `make fuzz`, and which benchmarks `make bench` runs.
FUZZTIME ?= 30s
BENCH ?= .
# Where cargo builds the Rust peer: once for all checkouts of this user.
export CARGO_TARGET_DIR ?= $(if $(XDG_CACHE_HOME),$(XDG_CACHE_HOME),$(HOME)/.cache)/sealmq/rust

.DEFAULT_GOAL := help

.PHONY: help
help: ## list the targets
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## /{printf "%-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: test
test: ## everything: install what is needed, check, lint, test with all peers, fuzz briefly
	@scripts/test.sh

.PHONY: check
check: ## before a commit: format, vet, lint, tidy, tests with the race detector
	@scripts/test.sh static go

.PHONY: build
build: ## the static binary, bin/sealmq
	CGO_ENABLED=0 go build -trimpath -ldflags '-s -w -X main.version=$(VERSION)' -o $(BINARY) ./cmd/sealmq

.PHONY: lint
lint: ## format, vet, golangci-lint, tidy, known vulnerabilities
	@scripts/test.sh static

.PHONY: fmt
fmt: ## format Go and Rust
	gofmt -w $$(git ls-files '*.go')
	cargo fmt --manifest-path integration/rust/Cargo.toml

.PHONY: e2e
e2e: ## the tests with real peers alone
	go test -race -shuffle=on ./integration/...

.PHONY: chaos
chaos: ## N messages (1000000) under faults; SEED=… repeats a run, EVERY=… ms between faults, SYNC=always|interval|memory, PLAIN=1 for plain MQTT sessions
	SEALMQ_CHAOS_N=$(or $(N),1000000) SEALMQ_CHAOS_SEED=$(SEED) SEALMQ_CHAOS_EVERY=$(EVERY) \
	SEALMQ_CHAOS_SYNC=$(SYNC) SEALMQ_CHAOS_PLAIN=$(PLAIN) \
		go test -count=1 -v -timeout 24h -run '^TestChaos$$' ./integration/chaos

.PHONY: vectors
vectors: ## every test that replays wire vectors
	go test -count=1 -run 'Vector|Live|Capture|Replay' ./...

.PHONY: fuzz
fuzz: ## each fuzz target for FUZZTIME (30s)
	@FUZZTIME=$(FUZZTIME) scripts/test.sh fuzz

.PHONY: bench
bench: ## benchmarks, BENCH selects
	go test -run '^$$' -bench '$(BENCH)' -benchmem ./...

.PHONY: rust-peers
rust-peers: ## build the stock Rust peer of the integration tests
	cargo build --release --locked --manifest-path integration/rust/Cargo.toml

.PHONY: tools
tools: ## build the pinned linter and test runner into bin/
	go -C tools build -o ../bin/ tool

.PHONY: up
up: ## hub, bob, alice and an observer in containers
	docker compose up --build

.PHONY: down
down: ## stop them and forget their data
	docker compose down --volumes

.PHONY: clean
clean: ## remove what was built here
	rm -rf bin dist
