// Embed adds the forwarder to an MQTT server that exists already: it serves
// ordinary clients, with mochi's allow-all hook, and goes on doing so. Under the
// root "sealmq" the forwarder's own rules hold all the same.
//
//	go run ./examples/embed [ADDRESS]
//
// Queues are in memory. The example of package bridge/store has them on disk.
package main

import (
	"context"
	"crypto/rand"
	"log"
	"os"
	"os/signal"
	"strings"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/hooks/auth"

	"github.com/sealmq/sealmq/bridge"
	mochibridge "github.com/sealmq/sealmq/bridge/mochi"
	"github.com/sealmq/sealmq/bridge/mochi/guard"
	"github.com/sealmq/sealmq/identity"
)

func main() {
	address := "127.0.0.1:1883"
	if len(os.Args) > 1 {
		address = os.Args[1]
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	server, end, err := serve(address)
	if err != nil {
		log.Fatal(err)
	}
	log.Println("listening")
	<-ctx.Done()
	_ = server.Close()
	end()
}

// maxPacket bounds MQTT packets; frames of 256 KiB fit.
const maxPacket = 1 << 20

// serve starts the server that exists already, and the forwarder in it.
func serve(address string) (server *mqtt.Server, end func(), err error) {
	// The server as it was: it lets everybody do everything.
	capabilities := mqtt.NewDefaultServerCapabilities()
	capabilities.MaximumPacketSize = maxPacket // 256 MiB otherwise
	server = mqtt.New(&mqtt.Options{Capabilities: capabilities})
	if err := server.AddHook(new(auth.AllowHook), nil); err != nil {
		return nil, nil, err
	}
	listener, err := guard.NewListener(guard.Config{ID: "tcp", Address: address, PacketLimit: maxPacket})
	if err != nil {
		return nil, nil, err
	}
	if err := server.AddListener(listener); err != nil {
		return nil, nil, err
	}
	// What is new.
	end, err = addForwarder(server)
	if err != nil {
		return nil, nil, err
	}
	return server, end, server.Serve()
}

// addForwarder adds the forwarder to a server.
func addForwarder(server *mqtt.Server) (end func(), err error) {
	id, err := identity.Create() // keep it in a vault in a real program, and use IdentitySigner
	if err != nil {
		return nil, err
	}
	config := bridge.Config{Identity: bridge.EphemeralIdentitySigner(id)}
	rand.Read(config.Key[:]) // keep it too: live channels end with it
	b, err := bridge.New(config)
	if err != nil {
		return nil, err
	}
	hook, err := mochibridge.New(mochibridge.Options{Server: server, Bridge: b, Authenticate: whoIs})
	if err != nil {
		return nil, err
	}
	return func() { _ = b.Close() }, server.AddHook(hook, nil)
}

// whoIs says who a client is. This one believes the client id, which is right on
// a loopback address only: elsewhere check a password or a certificate here.
func whoIs(c mochibridge.ConnectInfo) (bridge.Principal, error) {
	name, _, _ := strings.Cut(c.ClientID, "-")
	id, err := identity.ParseIdentifier(name)
	if err != nil {
		return bridge.Principal{}, mochibridge.ErrNotOurs // an ordinary client
	}
	return bridge.Principal{ClientID: c.ClientID, Identity: id, Role: bridge.RoleDevice}, nil
}
