package device_test

import (
	"context"
	"fmt"
	"log"
	"time"

	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/device"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/route"
)

// Bob is reached at a forwarding address, and answers.
func Example_bob() {
	ctx := context.Background()
	bob, err := identity.Create() // or from a vault: identity.OpenVault
	if err != nil {
		log.Fatal(err)
	}
	node, err := device.Connect(ctx, "mqtt://hub.example:1883", device.Config{Identity: bob})
	if err != nil {
		log.Fatal(err)
	}
	defer node.Close()
	if _, err := node.Listen("bob_secure_channel_listener", channel.TrustEveryone); err != nil {
		log.Fatal(err)
	}
	forwarder, err := node.CreateForwarder(ctx, "bob_secure_channel_listener")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("Forwarding address:", forwarder.Address())

	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	msg, err := node.Receive(ctx, "app")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("Bob Received: %s from %s\n", msg, msg.From)
	if err := node.ReplyString(ctx, msg, "Hello Alice!"); err != nil {
		log.Fatal(err)
	}
}

// Alice needs Bob's forwarding address, and his identifier to be sure that it is
// him.
func Example_alice() {
	ctx := context.Background()
	alice, err := identity.Create()
	if err != nil {
		log.Fatal(err)
	}
	node, err := device.Connect(ctx, "mqtt://hub.example:1883", device.Config{Identity: alice})
	if err != nil {
		log.Fatal(err)
	}
	defer node.Close()
	bobID, err := identity.ParseIdentifier("I0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef")
	if err != nil {
		log.Fatal(err)
	}
	ch, err := node.Dial(ctx, route.To("FWD_0123456789abcdef"), channel.TrustIdentifiers(bobID))
	if err != nil {
		log.Fatal(err)
	}
	if err := ch.SendString(ctx, "app", "Hello Ockam!"); err != nil {
		log.Fatal(err)
	}
	if err := ch.Flush(ctx); err != nil { // the hub has it
		log.Fatal(err)
	}
}

// A service of Bob's, and a request to it.
func ExampleNode_HandleFunc() {
	t := exampleT
	h := startHub(t, nil)
	ctx := context.Background()
	bob := connect(t, h.url(), device.Config{})
	alice := connect(t, h.url(), device.Config{})

	_ = bob.HandleFunc("greeter", func(ctx context.Context, m *device.Message) {
		if name, err := m.Text(); err == nil {
			_ = bob.ReplyString(ctx, m, "Hello "+name+"!")
		}
	})
	_, _ = bob.Listen("listener", channel.TrustIdentifiers(alice.Identifier()))
	forwarder, _ := bob.CreateForwarder(ctx, "listener")

	ch, err := alice.Dial(ctx, route.To(forwarder.Address()), channel.TrustIdentifiers(bob.Identifier()))
	if err != nil {
		fmt.Println(err)
		return
	}
	answer, err := ch.RequestString(ctx, "greeter", "Ockam")
	fmt.Println(answer, err)
	_ = alice.Close()
	_ = bob.Close()
	h.left()
	h.stop()
	// Output: Hello Ockam! <nil>
}
