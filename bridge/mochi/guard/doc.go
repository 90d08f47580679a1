// Package guard makes a mochi MQTT server (github.com/mochi-mqtt/server/v2)
// safe to expose: it is for everybody who embeds mochi, with or without the
// forwarder of package mochibridge.
//
// It has three parts, each usable without the others:
//
//   - [Listener], a listener for TCP, TLS, WebSocket and WebSocket over TLS
//     whose connections survive panics of mochi's decoders and of hooks, must
//     say CONNECT within a deadline, are counted and limited in total, before
//     CONNECT and for each address, and never block a writer: output goes to a
//     bounded buffer that a goroutine of the connection drains, and a client
//     that does not drain it is closed and counted.
//   - [Fixes], a hook that corrects faults of mochi v2.7.9 that ordinary
//     clients meet: ghost sessions, packet identifiers shared by both
//     directions, Receive Maximum, topic aliases, wills that nobody checks,
//     and topics deep enough to stall the server.
//   - [Redact], a log handler that keeps packets out of the logs: mochi logs
//     whole packets, payloads and passwords included.
//
// Usual use:
//
//	l, err := guard.NewListener(guard.Config{ID: "tcp", Address: ":1883", PacketLimit: 1 << 20})
//	err = server.AddListener(l)
//	fixes, err := guard.NewFixes(server, guard.FixesConfig{})
//	err = server.AddHook(fixes, nil)
//
// What it cannot do: mochi writes queued packets and keeps its house on
// goroutines of its own, so a panic of a foreign hook there (OnPacketEncode,
// OnPacketSent, OnSysInfoTick, OnWillSent for delayed wills, expiry hooks) ends
// the process as before. The hooks of this module recover in each method.
//
// Everything here is safe for concurrent use unless a method says otherwise.
package guard
