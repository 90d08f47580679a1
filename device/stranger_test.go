package device_test

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/sealmq/sealmq/device"
)

// A wrong port is named as what it is, and long before the time for an attempt is over.
func TestWrongPorts(t *testing.T) {
	h := startHub(t, nil)
	ockam := startTCPHub(t, h.id, "127.0.0.1:0", nil).addr
	web := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(web.Close)
	secureWeb := httptest.NewTLSServer(http.NotFoundHandler())
	t.Cleanup(secureWeb.Close)
	plainHTTP, https := web.Listener.Addr().String(), secureWeb.Listener.Addr().String()
	banner := answering(t, "SSH-2.0-x\r\n")
	alert := answering(t, "\x15\x03\x01\x00\x02\x02\x46")
	hangup := answering(t, "")
	for _, tc := range []struct {
		name, url string
		want      error
		says      string
	}{
		{"HTTP", "mqtt://" + plainHTTP, device.ErrNotHub, "an HTTP server (MQTT over WebSocket needs ws://"},
		{"WebSocket", "mqtt://" + h.ws, device.ErrNotHub, "an HTTP server (MQTT over WebSocket needs ws://"},
		{"HTTPS, over TLS", "mqtts://" + https, device.ErrNotHub, "an HTTP server"},
		{"HTTPS", "mqtt://" + https, device.ErrNoAnswer, "a TLS port, if it is one, needs mqtts://"},
		{"TLS", "mqtt://" + h.tls, device.ErrNoAnswer, "a TLS port, if it is one, needs mqtts://"},
		{"TLS with alert", "mqtt://" + alert, device.ErrNotHub, "a TLS port, which needs mqtts://"},
		{"Ockam", "mqtt://" + ockam, device.ErrHubAway, "tcp://"}, // depends on who is first to write,
		{"SSH", "mqtt://" + banner, device.ErrNotHub, `"SSH-2.0-x\r\n"`},
		{"hang-up", "mqtt://" + hangup, device.ErrNoAnswer, "taken and then ended"},
		{"TLS to MQTT", "mqtts://" + h.addr, device.ErrNoAnswer, "a port without TLS, if it is one, needs mqtt://"},
		{"TLS to HTTP", "mqtts://" + plainHTTP, device.ErrNotHub, "without TLS: an HTTP server"},
		{"Ockam to MQTT", "tcp://" + h.addr, device.ErrNoAnswer, "an MQTT port, if it is one, needs mqtt://"},
		{"Ockam to HTTP", "tcp://" + plainHTTP, device.ErrNotHub, "an HTTP server"},
		{"Ockam to SSH", "tcp://" + banner, device.ErrNotHub, `"SSH-2.0-x\r\n"`},
		{"WebSocket to HTTP", "ws://" + plainHTTP, device.ErrNotHub, "an HTTP server without a WebSocket for MQTT at / (status 404"},
		{"WebSocket with path", "ws://" + plainHTTP + "/mqtt", device.ErrNotHub, "for MQTT at /mqtt "},
		{"WebSocket to HTTPS", "wss://" + https, device.ErrNotHub, "an HTTP server without a WebSocket"},
		{"WebSocket to MQTT", "ws://" + h.addr, device.ErrNoAnswer, "taken and then ended"},
		{"WebSocket to Ockam", "ws://" + ockam, device.ErrHubAway, "WebSocket"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			// Without the nudge the silent ones take ConnectTimeout, and end as another error.
			n, err := device.Connect(within(t), tc.url, device.Config{
				Identity: newIdentity(t), TLS: &tls.Config{InsecureSkipVerify: true},
			})
			if err == nil {
				_ = n.Close()
				t.Fatal("connected")
			}
			if !errors.Is(err, tc.want) || !errors.Is(err, device.ErrHubAway) || !strings.Contains(err.Error(), tc.says) {
				t.Errorf("%v, want %v with %q", err, tc.want, tc.says)
			}
		})
	}
}

// answering is a server that answers the first bytes with a text, and hangs up.
func answering(t *testing.T, text string) (addr string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			if _, err := io.ReadAtLeast(c, make([]byte, 1024), 1); err == nil {
				_, _ = io.WriteString(c, text)
			}
			_ = c.Close()
		}
	}()
	t.Cleanup(func() {
		_ = ln.Close()
		<-done
	})
	return ln.Addr().String()
}
