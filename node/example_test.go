package node_test

import (
	"context"
	"fmt"

	"github.com/sealmq/sealmq/node"
	"github.com/sealmq/sealmq/route"
)

func Example() {
	n, err := node.New(node.Config{})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer n.Close()
	// Open to the peers of secure channels only; plain frames are refused.
	err = n.Handle("echo", node.Access{Channels: true}, func(ctx context.Context, m *node.Message) {
		_ = n.Reply(ctx, m, m.Payload)
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	m, err := n.Request(context.Background(), route.To("echo"), []byte("ping"), route.Stored)
	fmt.Println(string(m.Payload), err)

	drop := n.Inject(node.Origin{Via: node.Forwarded}, route.Frame{Onward: route.To("echo")}, route.Stored)
	fmt.Println(drop)
	// Output:
	// ping <nil>
	// refused
}
