// Package broker is the hub put together: a configuration, the embedded MQTT
// broker with the forwarder, who may connect, the hub's identity, and the
// status pages. cmd/sealmq runs it as a program; a Go program can run it too:
//
//	hub, err := broker.New(broker.Config{MQTT: []string{"127.0.0.1:0"}})
//	if err != nil { … }
//	if err := hub.Start(ctx); err != nil { … }
//	defer hub.Shutdown(context.Background())
//	fmt.Println(hub.MQTTURL(), hub.Identifier())
//
// Teams that have a mochi server of their own do not need this package: they
// add the hook of bridge/mochi to their server.
//
// A hub sees who talks to whom, when and how much. It cannot read or forge a
// message: what it forwards is sealed by the devices.
package broker
