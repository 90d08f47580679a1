// Package hubproto holds the messages between a device and its hub that Ockam
// does not define: hello, notice, lookup, and the records that observers see.
//
// Every message is one deterministic CBOR map with integer keys (RFC 8949 4.2);
// key 0 is the version. Decoding is strict about form (no duplicate keys, no
// tags, no indefinite lengths, no bytes after the map), ignores keys it does
// not know, and refuses a version it does not know. A message is [MaxMessage]
// bytes at most ([MaxProof] for a Proof), checked before anything is allocated.
//
// Encoding and decoding are pure functions, safe for concurrent use. Decoded
// values own their memory. Parsing verifies nothing but form. The signature in a
// [HelloAnswer] is checked by the device with the hub's pinned identity over
// [HelloSigned]; [Proof.Verify] and [Claim.Verify] check the other two signed
// messages. Whom to trust is decided elsewhere.
//
// A record that observers read as JSON ([ForwarderRecord], [StatusRecord]) is
// one struct with two renderings; the JSON names are part of the protocol.
package hubproto
