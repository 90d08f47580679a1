package hubproto

import (
	"fmt"

	"github.com/sealmq/sealmq/route"
)

// Reserved addresses of notices: on the device, and as the return route.
const (
	NoticeTarget = "sealmq.notice"
	NoticeSource = "notice"
)

// Notice tells a sender what became of a frame. It may end a wait; it never
// makes a device accept or discard data, and it is never answered.
//
//	{0: 1, 1: reason uint, 2: first hop / null, 3: last return hop / null, 4: count uint}
//
// A hop is an Ockam address, [transport uint, value bstr].
type Notice struct {
	Reason Reason
	// FirstHop is the first onward hop of the frame as its sender wrote it;
	// false in HasFirst when the hub could not read one.
	FirstHop route.Address
	HasFirst bool
	// LastReturn is the last hop of the frame's return route as its sender
	// wrote it; false in HasReturn when that was empty.
	LastReturn route.Address
	HasReturn  bool
	// Count is how many frames this notice stands for, 1 at least.
	Count uint64
}

type hopWire struct {
	_         struct{} `cbor:",toarray"`
	Transport uint8
	Value     []byte
}

type noticeWire struct {
	Version    uint64   `cbor:"0,keyasint"`
	Reason     uint8    `cbor:"1,keyasint"`
	FirstHop   *hopWire `cbor:"2,keyasint"`
	LastReturn *hopWire `cbor:"3,keyasint"`
	Count      uint64   `cbor:"4,keyasint"`
}

func toHop(a route.Address, has bool) *hopWire {
	if !has {
		return nil
	}
	return &hopWire{Transport: uint8(a.Transport), Value: []byte(a.Value)}
}

func (h *hopWire) address() (route.Address, bool) {
	if h == nil {
		return route.Address{}, false
	}
	return route.Address{Transport: route.Transport(h.Transport), Value: string(h.Value)}, true
}

// Marshal returns the encoded notice.
func (n *Notice) Marshal() ([]byte, error) {
	return encode(noticeWire{
		Version: Version, Reason: uint8(n.Reason), Count: max(n.Count, 1),
		FirstHop: toHop(n.FirstHop, n.HasFirst), LastReturn: toHop(n.LastReturn, n.HasReturn),
	})
}

// ParseNotice reads a notice. A reason of a later version is kept as it is; see
// [Reason.Known].
func ParseNotice(b []byte) (*Notice, error) {
	var w noticeWire
	if err := decode(b, &w); err != nil {
		return nil, err
	}
	if w.Reason == 0 || w.Count == 0 {
		return nil, fmt.Errorf("%w: notice without reason or count", ErrMalformed)
	}
	n := &Notice{Reason: Reason(w.Reason), Count: w.Count}
	n.FirstHop, n.HasFirst = w.FirstHop.address()
	n.LastReturn, n.HasReturn = w.LastReturn.address()
	return n, nil
}

// NoticeFrame returns the frame that carries n to a device.
func NoticeFrame(n *Notice) ([]byte, error) {
	body, err := n.Marshal()
	if err != nil {
		return nil, err
	}
	f := route.Frame{Onward: route.To(NoticeTarget), Return: route.To(NoticeSource), Payload: body}
	return route.AppendFrame(nil, &f), nil
}
