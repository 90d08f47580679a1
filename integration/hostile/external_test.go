package hostile

import (
	"context"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/sealmq/sealmq/broker"
)

// theAttacks are those that TestExternalHub has run: devices on MQTT and TCP in both roles,
// and a stock node.
const theAttacks = "^(TestData|TestSwappedChannels|TestManInTheMiddle|TestReplayedConversation|TestStockSwappedChannels)$/^duplicate$"

// suite runs attacks in a process of its own, as who reads README.md does, and returns
// what passed and all that it said.
func suite(t *testing.T, attacks string, env ...string) (passed []string, out string, err error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.v", "-test.count=1", "-test.run", attacks)
	cmd.Env = append(slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "SEALMQ_HOSTILE_") }), env...)
	said, err := cmd.CombinedOutput()
	for _, m := range regexp.MustCompile(`(?m)^ *--- PASS: (\S+)`).FindAllSubmatch(said, -1) {
		passed = append(passed, string(m[1]))
	}
	slices.Sort(passed)
	return passed, string(said), err
}

// TestExternalHub runs part of the suite against a hub that is not its own, given by what
// README.md says, and shows that a wrong address is no silent success.
func TestExternalHub(t *testing.T) {
	if os.Getenv("SEALMQ_HOSTILE_HUB") != "" {
		return // this is such a run
	}
	t.Parallel()
	hub, err := broker.New(broker.Config{MQTT: []string{"127.0.0.1:0"}, TCP: "127.0.0.1:0"})
	must(t, err)
	must(t, hub.Start(within(t)))
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		must(t, hub.Shutdown(ctx))
	})
	readme, err := os.ReadFile("README.md")
	must(t, err)
	m := regexp.MustCompile(`(?m)^ +(\w+=)mqtt://127\.0\.0\.1:1883 (\w+=)127\.0\.0\.1:4000 go test .*\./integration/hostile$`).FindSubmatch(readme)
	if m == nil {
		t.Fatal("README.md does not say how to name another hub")
	}
	mqtt, tcp := string(m[1])+"mqtt://"+hub.MQTTAddr().String(), string(m[2])+hub.TCPAddr().String()

	got, out, err := suite(t, theAttacks, mqtt, tcp)
	if err != nil || strings.Contains(out, "--- SKIP") {
		t.Fatalf("%v\n%s", err, out)
	}
	want := []string{
		"TestData", "TestData/duplicate", "TestData/duplicate/of_an_initiator_on_TCP", "TestData/duplicate/of_the_initiator",
		"TestData/duplicate/of_the_responder", "TestManInTheMiddle", "TestReplayedConversation", "TestStockSwappedChannels", "TestSwappedChannels",
	}
	if !slices.Equal(got, want) {
		t.Errorf("%q passed, want %q", got, want)
	}
	saw := hub.Status().Counters
	for name, least := range map[string]float64{
		"sealmq_logins_total{result=ok}": 10, "sealmq_tcp_events_total{event=accepted}": 2, "sealmq_frames_delivered_total": 2000,
	} {
		if saw[name] < least {
			t.Errorf("the hub given has %s %v, want %v at least", name, saw[name], least)
		}
	}

	got, out, err = suite(t, "^(TestManInTheMiddle|TestStockSwappedChannels)$", mqtt)
	if err == nil || !slices.Equal(got, []string{"TestManInTheMiddle"}) || !strings.Contains(out, "set SEALMQ_HOSTILE_TCP") {
		t.Errorf("without the TCP port: %q passed, %v\n%s", got, err, out)
	}
	for _, bad := range []string{"127.0.0.1:1883", "mqtts://127.0.0.1:8883"} {
		if got, out, err = suite(t, "^TestManInTheMiddle$", "SEALMQ_HOSTILE_HUB="+bad); err == nil || !strings.Contains(out, "want mqtt://HOST:PORT") {
			t.Errorf("%s: %q passed, %v\n%s", bad, got, err, out)
		}
	}
}
