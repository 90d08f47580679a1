package device

import "github.com/sealmq/sealmq/channel"

// WithoutDelivery makes the device one that acknowledges no messages.
func (c Config) WithoutDelivery() Config {
	c.features = channel.FeatureDelivery
	return c
}
