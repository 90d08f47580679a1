package broker

import (
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/sealmq/sealmq/bridge"
	mochibridge "github.com/sealmq/sealmq/bridge/mochi"
	"github.com/sealmq/sealmq/bridge/mochi/guard"
)

// sample is one number of /metrics and /status.
type sample struct {
	name, help   string
	gauge        bool
	label, value string // at most one label
	n            float64
}

// key is the sample's name in /status.
func (s sample) key() string {
	if s.label == "" {
		return s.name
	}
	return s.name + "{" + s.label + "=" + s.value + "}"
}

// samples reads every counter and gauge of the hub.
func (h *Hub) samples() []sample {
	c := h.bridge.Counters()
	all := []sample{
		{name: "sealmq_frames_received_total", help: "Frames received from peers.", n: float64(c.Received)},
		{name: "sealmq_frames_originated_total", help: "Frames of the hub itself.", n: float64(c.Originated)},
		{name: "sealmq_frames_restored_total", help: "Frames that the hub's last process left in its store.", n: float64(c.Restored)},
		{name: "sealmq_frames_delivered_total", help: "Frames that a peer acknowledged or its connection took.", n: float64(c.Delivered)},
		{name: "sealmq_frames_served_total", help: "Frames taken by the hub's services.", n: float64(c.Served)},
		{name: "sealmq_frames_queued", help: "Frames in queues now.", gauge: true, n: float64(c.Queued)},
		{name: "sealmq_frames_queued_bytes", help: "Bytes of the frames in queues now.", gauge: true, n: float64(c.QueuedBytes)},
		{name: "sealmq_frames_waiting", help: "Frames received and not yet acknowledged.", gauge: true, n: float64(c.Waiting)},
		{name: "sealmq_frames_waiting_bytes", help: "Bytes of the frames received and not yet acknowledged.", gauge: true, n: float64(c.WaitingBytes)},
		{name: "sealmq_notices_total", help: "Notices written to senders.", n: float64(c.Notices)},
		{name: "sealmq_notices_held_total", help: "Notices that were never written: too many different ones at once, or to peers that take none.", n: float64(c.NoticesHeld)},
		{name: "sealmq_packets_throttled_total", help: "Packets whose acknowledgement was withheld because of their sender's rate.", n: float64(c.Throttled)},
		{name: "sealmq_packets_withheld_total", help: "Packets whose acknowledgement waited for room in a full queue.", n: float64(c.Withheld)},
		{name: "sealmq_bad_acknowledgements_total", help: "Acknowledgements of what was never sent.", n: float64(c.BadAcks)},
		{name: "sealmq_observer_copies_total", help: "Copies and trace lines handed to observers.", n: float64(c.Copies)},
		{name: "sealmq_observer_copies_dropped_total", help: "Copies and trace lines that observers missed.", n: float64(c.CopiesDropped)},
		{name: "sealmq_peers", help: "Peers with a place in the router, connected or not.", gauge: true, n: float64(c.Ports)},
		{name: "sealmq_peers_displaced_total", help: "Devices that were away and forgotten to make room for others.", n: float64(c.Displaced)},
		{name: "sealmq_peers_attached", help: "Peers that receive frames now.", gauge: true, n: float64(c.Attached)},
		{name: "sealmq_forwarders", help: "Forwarding addresses.", gauge: true, n: float64(c.Forwarders)},
	}
	for d, n := range c.Dropped {
		all = append(all, sample{name: "sealmq_frames_dropped_total", help: "Frames dropped, by reason.",
			label: "reason", value: bridge.Drop(d).String(), n: float64(n)})
	}
	for k, n := range c.Kicked {
		if k == 0 {
			continue // no reason has this number
		}
		all = append(all, sample{name: "sealmq_connections_ended_total", help: "Connections that the router ended, by reason.",
			label: "reason", value: bridge.KickReason(k).String(), n: float64(n)})
	}
	for _, e := range []struct {
		name string
		n    *atomic.Uint64
	}{{"refused", &h.pages.refused}, {"displaced", &h.pages.displaced}} {
		all = append(all, sample{name: "sealmq_http_events_total", help: "Connections to the status pages that came to nothing, by event.",
			label: "event", value: e.name, n: float64(e.n.Load())})
	}
	if h.cert != nil {
		all = append(all, sample{name: "sealmq_tls_handshakes_busy_total", help: "TLS handshakes given up because too many waited, or theirs took too long.",
			n: float64(h.cert.busy.Load())})
	}
	conns, pending := h.limits.Open()
	all = append(all,
		sample{name: "sealmq_mqtt_connections", help: "Open MQTT connections.", gauge: true, n: float64(conns)},
		sample{name: "sealmq_mqtt_output_bytes", help: "Output that MQTT clients have yet to take.", gauge: true, n: float64(h.limits.Buffered())},
		sample{name: "sealmq_mqtt_arriving_bytes", help: "Long MQTT packets that have begun to arrive.", gauge: true, n: float64(h.limits.Arriving())},
		sample{name: "sealmq_memory_limit_bytes", help: "Configured ceiling of the heap; 0: none.", gauge: true, n: float64(h.cfg.Limits.Memory)},
		sample{name: "sealmq_mqtt_connections_pending", help: "MQTT connections before the end of CONNECT.", gauge: true, n: float64(pending)},
	)
	h.guarded.Each(func(e guard.Event, n uint64) {
		all = append(all, sample{name: "sealmq_mqtt_events_total", help: "What listeners and connections refused or mended, by event.",
			label: "event", value: e.String(), n: float64(n)})
	})
	h.hooked.Each(func(e mochibridge.Event, n uint64) {
		all = append(all, sample{name: "sealmq_topic_events_total", help: "What happened under the root besides frames, by event.",
			label: "event", value: e.String(), n: float64(n)})
	})
	all = append(all, h.storeSamples()...)
	all = append(all, h.ockam.samples()...)
	for r := range numLogins {
		all = append(all, sample{name: "sealmq_logins_total", help: "Logins, by result.",
			label: "result", value: r.String(), n: float64(h.logins[r].Load())})
	}
	for r := range numProofs {
		all = append(all, sample{name: "sealmq_proofs_total", help: "Proofs of identity at CONNECT, by result.",
			label: "result", value: r.String(), n: float64(h.proofs.counts[r].Load())})
	}
	return all
}

// collector hands the samples to Prometheus.
type collector struct{ h *Hub }

// Describe sends nothing: the samples describe themselves.
func (collector) Describe(chan<- *prometheus.Desc) {}

// Collect reads the hub once.
func (c collector) Collect(out chan<- prometheus.Metric) {
	for _, s := range c.h.samples() {
		var labels, values []string
		if s.label != "" {
			labels, values = []string{s.label}, []string{s.value}
		}
		kind := prometheus.CounterValue
		if s.gauge {
			kind = prometheus.GaugeValue
		}
		desc := prometheus.NewDesc(s.name, s.help, labels, nil)
		out <- prometheus.MustNewConstMetric(desc, kind, s.n, values...)
	}
}

// metrics returns a registry with the hub's numbers and those of its process.
func (h *Hub) metrics() *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(collector{h}, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return r
}
