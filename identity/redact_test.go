package identity

import (
	"bytes"
	"encoding/base64"
	"encoding/gob"
	"encoding/hex"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"strings"
	"testing"
)

// TestNothingPrints formats, logs and encodes everything that holds a secret,
// alone and inside other values, and looks for the secret in the output.
func TestNothingPrints(t *testing.T) {
	secret := bytes.Repeat([]byte{0xC5, 0x3A, 0x71, 0x9E}, 8)
	signer := must(NewEd25519Signer(secret))
	exchanger := must(NewX25519Exchanger(secret))
	wrapped := p256Signer(t, secret)
	p := must(Create(WithSigner(signer), WithExchanger(exchanger)))
	p.p.state.secret = hide(bytes.Clone(secret))
	must(p.IssueConnectProof(nil, 60e9))
	p.p.state.issuing.signer = signer
	withP256 := must(Create(WithSigner(wrapped)))
	key := must(p.ChannelKey())
	pass := must(Passphrase(secret))
	must(pass.p.derive(make([]byte, saltSize), argonCost{1, 8, 1}))
	pass.p.key = hide(secret)
	var st any = p.p.state

	type parent struct {
		exported  *Private
		Exported  *Private
		value     Private
		Value     Private
		key       *ChannelKey
		Key       ChannelKey
		signer    Signer
		Signer    Signer
		exchanger Exchanger
		Exchanger Exchanger
		pass      Protection
		Pass      *Protection
		state     any
		Many      []any
		many      map[string]any
	}
	all := []any{p, *p, key, *key, signer, exchanger, wrapped, pass, &pass, st, p.p, key.k, withP256, p.p.state.issuing, p.p.opts.signer}
	outer := parent{p, p, *p, *p, key, *key, signer, signer, exchanger, exchanger, pass, &pass, st, all, map[string]any{"p": p, "v": *p, "s": signer}}
	all = append(all, outer, &outer, []parent{outer}, [1]*parent{&outer}, map[string]parent{"x": outer}, struct{ p any }{p}, struct{ p *any }{&st})

	needles := map[string]string{
		"raw":     string(secret[:8]),
		"hex":     hex.EncodeToString(secret[:6]),
		"HEX":     strings.ToUpper(hex.EncodeToString(secret[:6])),
		"spaced":  "c5 3a 71 9e",
		"decimal": "197 58 113 158",
		"go":      "0xc5, 0x3a, 0x71",
		"base64":  base64.StdEncoding.EncodeToString(secret[:6]),
		"json":    "197,58,113,158",
		"quoted":  `\xc5:q\x9e`,
		"bigint":  fmt.Sprint(new(big.Int).SetBytes(secret))[:12],
	}
	look := func(t *testing.T, how, out string) {
		t.Helper()
		for name, needle := range needles {
			if strings.Contains(out, needle) {
				t.Errorf("%s shows the secret (%s): %.300q", how, name, out)
			}
		}
	}
	for i, v := range all {
		t.Run(fmt.Sprintf("%d_%T", i, v), func(t *testing.T) {
			for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "% x", "%#x", "%d", "%o", "%b", "%t", "%c", "%U", "%e", "%T", "%p", "%!", "%100v", "%w"} {
				look(t, verb, fmt.Sprintf(verb, v))
			}
			look(t, "Sprint", fmt.Sprint(v))
			look(t, "Sprintln", fmt.Sprintln(v))
			look(t, "error", fmt.Errorf("x: %v: %w", v, errors.New("y")).Error())
			var b bytes.Buffer
			for _, h := range []slog.Handler{slog.NewTextHandler(&b, nil), slog.NewJSONHandler(&b, nil)} {
				slog.New(h).Info("x", slog.Any("v", v), slog.Group("g", slog.Any("v", v)), slog.Any("w", []any{v}))
			}
			look(t, "slog", b.String())
			if out, err := json.Marshal(v); err == nil {
				look(t, "json", string(out))
			}
			if out, err := xml.Marshal(v); err == nil {
				look(t, "xml", string(out))
			}
			b.Reset()
			if err := gob.NewEncoder(&b).Encode(v); err == nil {
				look(t, "gob", b.String())
			}
		})
	}
	// What does print is useful.
	want := "identity.Private{" + p.Identifier().String() + "}"
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%x"} {
		if got := fmt.Sprintf(verb, p); got != want {
			t.Errorf("%s: %s", verb, got)
		}
	}
	for _, v := range []any{Private{}, ChannelKey{}, Protection{}, (*Private)(nil)} {
		_ = fmt.Sprintf("%v %s %#v", v, v, v)
	}
	for _, v := range all {
		for _, bad := range []bool{isA[interface{ MarshalText() ([]byte, error) }](v), isA[json.Marshaler](v), isA[interface{ MarshalBinary() ([]byte, error) }](v)} {
			if bad {
				t.Errorf("%T can be marshalled", v)
			}
		}
	}
}

func isA[T any](v any) bool { _, ok := v.(T); return ok }

// TestErrorsHoldNoSecrets breaks files and looks into the errors.
func TestErrorsHoldNoSecrets(t *testing.T) {
	p := must(Create())
	seed := p.p.state.signer.(*softSigner).seed()
	b := must(p.p.state.marshal(Protection{}, nil))
	for n := range b {
		c := bytes.Clone(b)
		c[n] ^= 0x15
		o := must(collect(nil))
		if _, _, err := unmarshalState(c, Protection{}, &o); err != nil {
			for _, needle := range []string{string(seed[:6]), hex.EncodeToString(seed[:6]), base64.StdEncoding.EncodeToString(seed[:6])} {
				if strings.Contains(err.Error(), needle) {
					t.Fatalf("at %d: %v", n, err)
				}
			}
		}
	}
}
