package broker

import (
	"context"
	"errors"
	"fmt"
	"net"
	"syscall"
)

// ListenError says that an address cannot be listened at.
type ListenError struct {
	// Key is the setting that names the address, Addr the address.
	Key  string
	Addr string
	// Err is what the system said.
	Err error
}

func (e *ListenError) Error() string {
	why := rootCause(e.Err).Error()
	if errors.Is(e.Err, syscall.EADDRINUSE) {
		why = "the port is in use"
	}
	return fmt.Sprintf("broker: cannot listen at %s: %s", e.Addr, why)
}

// Unwrap returns what the system said.
func (e *ListenError) Unwrap() error { return e.Err }

// Hint says what to do.
func (e *ListenError) Hint() string {
	switch {
	case errors.Is(e.Err, syscall.EADDRINUSE):
		return fmt.Sprintf("another program, perhaps another hub, listens there: stop it, or choose another port with --%s (port 0 takes a free one)", e.Key)
	case errors.Is(e.Err, syscall.EACCES):
		return fmt.Sprintf("ports below 1024 need a privilege: choose another with --%s", e.Key)
	case errors.Is(e.Err, syscall.EADDRNOTAVAIL):
		return fmt.Sprintf("this machine does not have that address: change --%s", e.Key)
	}
	return fmt.Sprintf("change --%s", e.Key)
}

// rootCause unwraps an error to what the system said.
func rootCause(err error) error {
	for {
		next := errors.Unwrap(err)
		if next == nil {
			return err
		}
		err = next
	}
}

// listen opens a TCP port. key is the setting that names it.
func listen(ctx context.Context, key, addr string) (net.Listener, error) {
	ln, err := new(net.ListenConfig).Listen(ctx, "tcp", addr)
	if err != nil {
		return nil, &ListenError{Key: key, Addr: addr, Err: err}
	}
	return ln, nil
}

// ports are the listeners of a hub.
type ports struct {
	mqtt       []net.Listener // one for each endpoint
	web, ockam net.Listener   // nil without
}

// openPorts opens every port, or none.
func (h *Hub) openPorts(ctx context.Context) (err error) {
	p := &h.ports
	defer func() {
		if err != nil {
			p.close()
		}
	}()
	for _, e := range h.endpoints {
		ln, err := listen(ctx, "mqtt", e.addr)
		if err != nil {
			return err
		}
		p.mqtt = append(p.mqtt, ln)
	}
	if h.cfg.HTTP != "" {
		if p.web, err = listen(ctx, "http", h.cfg.HTTP); err != nil {
			return err
		}
	}
	if h.cfg.TCP != "" {
		p.ockam, err = listen(ctx, "tcp", h.cfg.TCP)
	}
	return err
}

// closePeers closes the ports for peers. Closing a port twice does nothing.
func (p *ports) closePeers() {
	for _, ln := range p.mqtt {
		_ = ln.Close()
	}
	if p.ockam != nil {
		_ = p.ockam.Close()
	}
}

// close closes every port.
func (p *ports) close() {
	p.closePeers()
	if p.web != nil {
		_ = p.web.Close()
	}
}
