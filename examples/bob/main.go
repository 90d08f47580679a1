// Bob waits for a message through a secure channel. Run it, then run Alice with
// the forwarding address it prints:
//
//	sealmq hub
//	go run ./examples/bob [HUB]
//	go run ./examples/alice FORWARDING_ADDRESS [HUB]
package main

import (
	"cmp"
	"context"
	"fmt"
	"log"
	"os"
	"time"

	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/device"
	"github.com/sealmq/sealmq/identity"
)

func main() {
	hub := cmp.Or(argument(1), os.Getenv("SEALMQ_HUB"), "mqtt://127.0.0.1:1883")
	if err := bob(context.Background(), hub); err != nil {
		log.Fatal(err)
	}
}

func bob(ctx context.Context, hub string) error {
	// Create an identity to represent Bob.
	id, err := identity.Create()
	if err != nil {
		return err
	}
	// Connect to the hub, which Alice can reach too.
	node, err := device.Connect(ctx, hub, device.Config{Identity: id})
	if err != nil {
		return err
	}
	defer node.Close()

	// Listen for secure channels from anybody who proves an identity.
	if _, err := node.Listen("bob_secure_channel_listener", channel.TrustEveryone); err != nil {
		return err
	}
	// The forwarder at the hub passes frames on to the listener.
	fwd, err := node.CreateForwarder(ctx, "bob_secure_channel_listener")
	if err != nil {
		return err
	}
	fmt.Println("Forwarding address:", fwd.Address())

	// Receive a message at "app".
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	msg, err := node.Receive(ctx, "app")
	if err != nil {
		return err
	}
	fmt.Printf("Bob Received: %s from Alice via secure channel\n", msg)
	return nil
}

func argument(i int) string {
	if i < len(os.Args) {
		return os.Args[i]
	}
	return ""
}
