// Package matrix is the proof that our peers and the original implementation are
// one network: the same body of tests for every pair of parties and every hub
// between them. A party is who listens or dials: a Go device on MQTT, a Go device
// on the Ockam TCP transport, a stock Rust node. What cells there are stands in
// cells_test.go; what each has to show in body_test.go.
package matrix
