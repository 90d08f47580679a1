package matrix

import "testing"

// cells are the rows of the matrix: who listens, who dials, and what is between.
var cells = []cell{
	{name: "Go on MQTT, Go on MQTT", hub: startOurHub, left: goOnMQTT, right: goOnMQTT},
	{name: "Go on MQTT, Go on TCP", hub: startOurHub, left: goOnMQTT, right: goOnTCP},
	{name: "Go on TCP, Go on MQTT", hub: startOurHub, left: goOnTCP, right: goOnMQTT},
	{name: "Go on TCP, Go on MQTT, static", hub: startOurHub, left: goOnTCP, right: goOnMQTT, alias: true},
	{name: "Go on TCP, Go on TCP", hub: startOurHub, left: goOnTCP, right: goOnTCP},
}

func TestMatrix(t *testing.T) {
	for _, c := range cells {
		t.Run(c.name, c.run)
	}
}
