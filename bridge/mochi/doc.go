// Package mochibridge puts the forwarder of package bridge into a mochi MQTT
// server (github.com/mochi-mqtt/server/v2): a hook that takes the frames which
// devices publish, and delivers what is queued for them.
//
// Usual use, in a server of one's own or in one that exists already:
//
//	hook, err := mochibridge.New(mochibridge.Options{
//		Server: server, Bridge: b, Authenticate: authenticate,
//	})
//	err = server.AddHook(hook, nil)
//
// with listeners of package guard (bridge/mochi/guard). On mochi's own
// listeners the hook guards the output of its clients by itself, but panics of
// mochi's decoders, the CONNECT deadline and connection limits are not covered
// there, frames take the slower of two ways, and a device on a WebSocket has no
// TLS exporter value.
//
// # Under the root
//
// mochi lets a client in, or at a topic, when any one of its hooks says so. So
// the hook does not rely on answers: a CONNECT that it refuses gets its CONNACK
// from the hook and ends; a PUBLISH under the root is taken before mochi
// processes it; a filter under the root is replaced by one that mochi does not
// store, and its SUBACK code set. Nothing under the root enters mochi's tree of
// subscriptions or its retained messages, so neither another hook, nor an
// allow-all hook, nor a stored session reaches it. In particular:
//
//   - a device publishes to its own <root>/<client id>/out, with QoS 0 or 1,
//     and subscribes to its own <root>/<client id>/in, with QoS 1; its inbox is
//     then served by the hook, with packet identifiers from 0x8000 up;
//   - an observer subscribes to anything under the root and gets records and
//     copies, with QoS 0; one that comes back to a session that mochi has kept sees
//     on, and gets the records again. A store of mochi's keeps no such filter: after a
//     restart an observer has to subscribe again, whatever the CONNACK says;
//   - anybody else gets 0x80 (MQTT 5: 0x87) for a filter under the root. A
//     filter that reaches beyond, such as "#", is granted and shows what lies
//     outside;
//   - a PUBLISH under the root by anybody else is dropped with QoS 0; with
//     QoS 1 and 2 it is answered 0x87 in MQTT 5 and ends the connection in
//     3.1.1, which has no other answer;
//   - a will under the root is refused at CONNECT;
//   - what the embedding program publishes inline under the root is dropped and
//     counted, and its inline subscriptions there see nothing: programs inside
//     the server use package bridge.
//
// Everything outside the root stays as it was.
//
// # Sizes
//
// The server's MaximumPacketSize must be at least the frame limit and 64 KiB. A
// frame above the frame limit in a packet within the packet limit is
// acknowledged and answered with the notice too-large, and the device stays
// connected. So is a packet above the packet limit on a guarded listener, up to
// 16 MiB and 64 KiB: it is read past, never kept. What is longer, or is no such
// PUBLISH, closes the connection, counted and logged by the listener; so does any
// of them in MQTT 5, which has a reason for it (0x95). On mochi's own listeners mochi
// closes the connection without a word, and hook or guard.Fixes count it.
//
// All exported methods are safe for concurrent use. No hook method blocks, and
// each recovers from panics of its own.
package mochibridge
