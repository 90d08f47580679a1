package route

import "fmt"

// MaxFrame is the longest frame body of the Ockam TCP transport, in bytes (spec
// routing 3.2). Exactly this many are allowed.
const MaxFrame = 16 << 20

// Defaults of Limits.
const (
	DefaultFrame   = 256 << 10 // bytes a body
	DefaultHops    = 64        // addresses a route
	DefaultAddress = 255       // bytes an address
)

// Smallest settings of Limits that still let stock peers work (spec routing 2.5).
const (
	minFrame   = 4 << 10
	minHops    = 10
	minAddress = 32
	maxHops    = 4096
	maxAddress = 64 << 10
)

// Limits are what a receiver accepts. Zero fields mean the defaults; a zero
// Limits is ready for use.
type Limits struct {
	// Frame is the longest body as received, in bytes, whatever canonical
	// re-encoding would make of it. Default 256 KiB.
	Frame int
	// Hops is the most addresses in each of the two routes. Default 64.
	Hops int
	// Address is the longest inner value of an address, in bytes. Default 255.
	Address int
}

// Validate reports settings that cannot work: a frame limit below 4 KiB or above
// MaxFrame, fewer than 10 or more than 4,096 hops, an address limit below 32
// bytes (a random address) or above 64 KiB. Zero fields are fine.
func (l Limits) Validate() error {
	check := func(what string, have, low, high int) error {
		if have != 0 && (have < low || have > high) {
			return fmt.Errorf("route: %s limit %d is not between %d and %d", what, have, low, high)
		}
		return nil
	}
	if err := check("frame", l.Frame, minFrame, MaxFrame); err != nil {
		return err
	}
	if err := check("hop", l.Hops, minHops, maxHops); err != nil {
		return err
	}
	return check("address", l.Address, minAddress, maxAddress)
}

// WithDefaults returns the limits with zero fields filled in, and none above the
// protocol's own.
func (l Limits) WithDefaults() Limits {
	if l.Frame <= 0 {
		l.Frame = DefaultFrame
	}
	if l.Hops <= 0 {
		l.Hops = DefaultHops
	}
	if l.Address <= 0 {
		l.Address = DefaultAddress
	}
	l.Frame = min(l.Frame, MaxFrame)
	l.Hops = min(l.Hops, maxHops)
	l.Address = min(l.Address, maxAddress)
	return l
}

// CheckRoute reports why no receiver with these limits takes a frame with r as one
// of its routes: ErrTooManyHops or ErrAddressTooLong.
func (l Limits) CheckRoute(r Route) error {
	l = l.WithDefaults()
	if len(r) > l.Hops {
		return fmt.Errorf("%w: %d, at most %d", ErrTooManyHops, len(r), l.Hops)
	}
	for _, a := range r {
		if len(a.Value) > l.Address {
			return fmt.Errorf("%w: %d bytes, at most %d", ErrAddressTooLong, len(a.Value), l.Address)
		}
	}
	return nil
}
