package mochibridge

import (
	"sync/atomic"
	"testing"

	"github.com/sealmq/sealmq/internal/rawmqtt"
	"github.com/sealmq/sealmq/route"
)

// The last packet of a connection is in mochi's statistics, too: one above the packet
// limit, for which a client of MQTT 5 is disconnected.
func TestStatisticsOfAnOversizedPacket(t *testing.T) {
	for _, v5 := range []bool{false, true} {
		h := newHub(t)
		big := h.device(t, "big", v5)
		before, bytes := atomic.LoadInt64(&h.Info.MessagesReceived), atomic.LoadInt64(&h.Info.BytesReceived)
		send(t, big, rawmqtt.Publish(v5, 2, "sealmq/big/out", big.next(), make([]byte, route.MaxFrame)))
		if v5 {
			closedByPeer(t, big.Client)
		} else {
			big.puback()
			processed(t, big)
		}
		after, size := atomic.LoadInt64(&h.Info.MessagesReceived), atomic.LoadInt64(&h.Info.BytesReceived)
		if after-before != 1 || size-bytes < route.MaxFrame {
			t.Errorf("v5=%v: %d messages, %d bytes", v5, after-before, size-bytes)
		}
	}
}

// processed waits until the hub has processed what was sent so far.
func processed(t *testing.T, d *device) {
	t.Helper()
	send(t, d, rawmqtt.Frame(rawmqtt.PINGREQ<<4, nil))
	for {
		p, err := d.ReadPacket()
		if err != nil {
			t.Fatal(err)
		}
		if p.Type() == rawmqtt.PINGRESP {
			return
		}
	}
}
