package route_test

import (
	"fmt"

	"github.com/sealmq/sealmq/route"
)

// A hop that routes frames reads them in place, looks up the first hop, and writes
// the forwarded form into its own buffer.
func ExampleView_AppendForwarded() {
	body := route.AppendFrame(nil, &route.Frame{
		Onward:  route.To("FWD_0123456789abcdef", "echoer"),
		Return:  route.To("alice"),
		Payload: []byte("sealed"),
	})
	forwarders := map[string]route.Hops{"FWD_0123456789abcdef": route.EncodeHops(route.To("bob"))}
	stamp := route.EncodeHops(route.To("dev_1"))

	v, err := route.ParseView(body, route.Limits{})
	if err != nil {
		fmt.Println(err)
		return
	}
	front, ok := forwarders[string(v.FirstHop().Value)]
	if !ok {
		fmt.Println("no such forwarder")
		return
	}
	out := v.AppendForwarded(nil, 1, front, stamp)

	f, err := route.ParseFrame(out, route.Limits{})
	fmt.Println(f.Onward, "|", f.Return, err)
	// Output: 0#bob => 0#echoer | 0#dev_1 => 0#alice <nil>
}

func ExampleParse() {
	r, err := route.Parse("FWD_0123456789abcdef=>listener")
	fmt.Println(r, err)
	// Output: 0#FWD_0123456789abcdef => 0#listener <nil>
}
