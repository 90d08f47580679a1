// Alice sends Bob a message through a secure channel; see examples/bob.
//
//	go run ./examples/alice FORWARDING_ADDRESS [HUB]
package main

import (
	"cmp"
	"context"
	"log"
	"os"
	"time"

	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/device"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/route"
)

func main() {
	forwardingAddress := cmp.Or(argument(1), os.Getenv("BOB_ADDRESS"))
	if forwardingAddress == "" {
		log.Fatal("usage: alice FORWARDING_ADDRESS [HUB]; Bob prints the address")
	}
	hub := cmp.Or(argument(2), os.Getenv("SEALMQ_HUB"), "mqtt://127.0.0.1:1883")
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := alice(ctx, hub, forwardingAddress); err != nil {
		log.Fatal(err)
	}
}

func alice(ctx context.Context, hub, forwardingAddress string) error {
	// Create an identity to represent Alice.
	id, err := identity.Create()
	if err != nil {
		return err
	}
	node, err := device.Connect(ctx, hub, device.Config{Identity: id})
	if err != nil {
		return err
	}
	defer node.Close()

	// The forwarding address alone is a complete route to Bob's listener.
	to, err := route.Parse(forwardingAddress)
	if err != nil {
		return err
	}
	// Open a channel to whoever proves an identity there.
	ch, err := node.Dial(ctx, to, channel.TrustEveryone)
	if err != nil {
		return err
	}
	// Send a message to "app" on Bob's side, and wait until the hub has it.
	if err := ch.SendString(ctx, "app", "Hello Ockam!"); err != nil {
		return err
	}
	return ch.Flush(ctx)
}

func argument(i int) string {
	if i < len(os.Args) {
		return os.Args[i]
	}
	return ""
}
