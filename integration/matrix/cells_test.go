package matrix

import "testing"

// cells are the rows of the matrix: who listens, who dials, and what is between.
var cells = []cell{
	{name: "Go on MQTT, Go on MQTT", hub: startOurHub, left: goOnMQTT, right: goOnMQTT},
	{name: "Go on MQTT, Go on TCP", hub: startOurHub, left: goOnMQTT, right: goOnTCP},
	{name: "Go on TCP, Go on MQTT", hub: startOurHub, left: goOnTCP, right: goOnMQTT},
	{name: "Go on TCP, Go on MQTT, static", hub: startOurHub, left: goOnTCP, right: goOnMQTT, alias: true},
	{name: "Go on TCP, Go on TCP", hub: startOurHub, left: goOnTCP, right: goOnTCP},
	{name: "Rust, Go on MQTT", hub: startOurHub, left: rust, right: goOnMQTT, stock: true},
	{name: "Rust, Go on MQTT, static", hub: startOurHub, left: rust, right: goOnMQTT, stock: true, alias: true},
	{name: "Go on MQTT, Rust", hub: startOurHub, left: goOnMQTT, right: rust, stock: true},
	{name: "Go on MQTT, Rust, static", hub: startOurHub, left: goOnMQTT, right: rust, stock: true, alias: true},
	{name: "Rust, Rust", hub: startOurHub, left: rust, right: rust, stock: true},
	{name: "Rust, Rust, static", hub: startOurHub, left: rust, right: rust, stock: true, alias: true},
	{name: "Go on TCP, Rust, at a stock relay", hub: startRustHub, left: goOnTCP, right: rust, stock: true},
	{name: "Go on TCP, Rust, at a stock relay, static", hub: startRustHub, left: goOnTCP, right: rust, stock: true, alias: true},
	{name: "Rust, Go on TCP, at a stock relay", hub: startRustHub, left: rust, right: goOnTCP, stock: true},
	{name: "Rust, Go on TCP, at a stock relay, static", hub: startRustHub, left: rust, right: goOnTCP, stock: true, alias: true},
}

func TestMatrix(t *testing.T) {
	for _, c := range cells {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			c.run(t)
		})
	}
}
