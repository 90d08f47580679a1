package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

func (a *app) healthCommand() *cobra.Command {
	var addr string
	var timeout time.Duration
	c := &cobra.Command{
		Use:   "health",
		Short: "Ask a hub whether it is ready, for a container's health check",
		Long: `Asks the hub's status page (hub --http) whether the hub accepts connections.
Exits 0 if it does and 69 if not.`,
		Example: "  sealmq health\n  sealmq health --http 127.0.0.1:8080",
		Args:    noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(c.Context(), timeout)
			defer cancel()
			if h := a.env(envHTTP); h != "" && !c.Flags().Changed("http") {
				addr = h
			}
			return a.health(ctx, addr)
		},
	}
	c.Flags().StringVar(&addr, "http", "127.0.0.1:8080", "host:port of the hub's status pages (also $"+envHTTP+")")
	c.Flags().DurationVar(&timeout, "timeout", 3*time.Second, "give up after this long")
	return c
}

func (a *app) health(ctx context.Context, addr string) error {
	const hint = "is the hub running with --http, and at this address?"
	addr = strings.TrimPrefix(addr, "http://")
	if _, _, err := net.SplitHostPort(addr); err != nil {
		return usagef("write for example --http 127.0.0.1:8080", "%q is not a host and port", addr)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+"/readyz", nil)
	if err != nil {
		return usagef("write for example --http 127.0.0.1:8080", "%q is not a host and port", addr)
	}
	transport := &http.Transport{DisableKeepAlives: true} // no proxy: the hub is near
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		if ctx.Err() != nil && errors.Is(ctx.Err(), context.Canceled) {
			return ctx.Err()
		}
		return coded(exitUnavailable, fmt.Errorf("no answer from http://%s/readyz: %w", addr, rootCause(err)), hint)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1024))
	if err != nil {
		return coded(exitUnavailable, fmt.Errorf("no whole answer from http://%s/readyz: %w", addr, err), hint)
	}
	text := strings.TrimSpace(string(body))
	if resp.StatusCode != http.StatusOK {
		return coded(exitUnavailable, fmt.Errorf("the hub at %s is not ready: %s", addr, text), "")
	}
	return a.result(map[string]string{"status": "ready"}, "ready")
}

// rootCause unwraps an error to what the system said.
func rootCause(err error) error {
	for {
		next := errors.Unwrap(err)
		if next == nil {
			return err
		}
		err = next
	}
}
