package mosquitto_test

import (
	"bytes"
	"testing"

	"go.uber.org/goleak"

	"github.com/sealmq/sealmq/integration/internal/mosquitto"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestClientsAtTheirOwnBroker(t *testing.T) {
	broker := mosquitto.Broker(t)
	retained := []byte("kept")
	opts := mosquitto.Options{QoS: 1, Extra: []string{"-r"}}
	if err := mosquitto.Publish(t, broker, opts, "a/retained", retained); err != nil {
		t.Fatal(err)
	}
	sub := mosquitto.Subscribe(t, broker, mosquitto.Options{QoS: 1}, "a/#", "b/+")
	kept := sub.Wait("the retained message", func(p mosquitto.Packet) bool { return p.Topic == "a/retained" })
	if !kept.Retained || !bytes.Equal(kept.Payload, retained) {
		t.Errorf("retained message came as %+v", kept)
	}

	// Bytes that a line of text would not survive, on a topic with a space.
	payload := []byte("packet 0 0\n\x00\xff end")
	if err := mosquitto.Publish(t, broker, mosquitto.Options{QoS: 1}, "b/two words", payload); err != nil {
		t.Fatal(err)
	}
	got := sub.Wait("the live message", func(p mosquitto.Packet) bool { return p.Topic == "b/two words" })
	if !bytes.Equal(got.Payload, payload) || got.Retained || got.QoS != "1" {
		t.Errorf("live message came as %+v", got)
	}

	for range 2 {
		if _, err := sub.Next(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(sub.Packets()); n != 2 {
		t.Errorf("%d packets, want 2", n)
	}
}

// A subscription is reported although nothing comes.
func TestSubscribeToSilence(t *testing.T) {
	sub := mosquitto.Subscribe(t, mosquitto.Broker(t), mosquitto.Options{}, "nothing/#")
	if n := len(sub.Packets()); n != 0 {
		t.Errorf("%d packets", n)
	}
}

func TestPublishReportsRefusal(t *testing.T) {
	if err := mosquitto.Publish(t, "127.0.0.1:1", mosquitto.Options{}, "a", nil); err == nil {
		t.Error("publishing to nobody works")
	}
}
