package channel

import (
	"bytes"
	"crypto/cipher"
	"crypto/ecdh"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/route"
)

// recording is what a hub has of a conversation.
type recording struct {
	m1, m2, m3          []byte
	fromAlice, fromBob  [][]byte // transport frames
	aliceSaid, bobsWord string   // what is looked for in it
}

// open decrypts the transport frames of each side up to the first that does not open. It
// returns how many those are, and whether the messages are among them.
func (r *recording) open(responderSends, initiatorSends [keyLen]byte) (opened int, read bool) {
	var text []byte
	for key, frames := range map[[keyLen]byte][][]byte{responderSends: r.fromBob, initiatorSends: r.fromAlice} {
		o := NewOpener(key)
		for _, f := range frames {
			plain, _, err := o.Open(nil, f)
			if err != nil {
				break // each key follows from the first
			}
			opened++
			text = append(text, plain...)
		}
	}
	return opened, bytes.Contains(text, []byte(r.aliceSaid)) && bytes.Contains(text, []byte(r.bobsWord))
}

// asBob goes through the recorded handshake as bob, with that ephemeral key.
func (r *recording) asBob(e keyPair, own *identity.ChannelKey) (int, bool) {
	if pub := e.Public(); !bytes.Equal(pub[:], r.m2[:keyLen]) {
		return 0, false // message 2 begins with it
	}
	x, _, err := newXX().read1(r.m1)
	if err != nil {
		return 0, false
	}
	x, m2, err := x.write2(e, own, own.AppendPresentation(nil))
	if err != nil || !bytes.Equal(m2, r.m2) {
		return 0, false
	}
	if x, _, err = x.read3(e, r.m3); err != nil {
		return 0, false
	}
	return r.open(x.split())
}

// asAlice goes through it as alice.
func (r *recording) asAlice(e keyPair, own *identity.ChannelKey) (int, bool) {
	x, m1, err := newXX().write1(e, nil)
	if err != nil || !bytes.Equal(m1, r.m1) {
		return 0, false
	}
	if x, _, err = x.read2(e, r.m2); err != nil {
		return 0, false
	}
	x, m3, err := x.write3(own, own.AppendPresentation(nil))
	if err != nil || !bytes.Equal(m3, r.m3) {
		return 0, false
	}
	return r.open(x.split())
}

// withSecrets goes through it with the results of the three Diffie-Hellmans (Noise: ee,
// es, se). readable says whether ee alone opens the beginning of message 2.
func (r *recording) withSecrets(ee, es, se []byte) (readable bool, opened int, read bool) {
	s := newSymmetric(protocolName)
	s.mixHash(r.m1)
	s.mixHash(nil)
	s.mixHash(r.m2[:keyLen])
	s.ck, s.k = hkdf2(&s.ck, ee)
	t := s
	_, err := t.decryptAndHash(r.m2[keyLen : keyLen+keyLen+tagLen])
	s.ck, _ = hkdf2(&s.ck, es)
	s.ck, _ = hkdf2(&s.ck, se)
	opened, read = r.open(xx{sym: s}.split())
	return err == nil, opened, read
}

// TestForwardSecrecy: a hub records a conversation and later gets both vaults, unlocked.
// With the long-term keys it is either of the two from now on, and it can work out two of
// the three Diffie-Hellmans of the handshake (es and se). It cannot read anything of what
// it has recorded, because the third one (ee) is of keys that were made for the
// handshake, and those are in no file: not by going through the handshake with any key
// that it has, nor with anything in the vaults as a key, nor by playing it to our code.
// With one ephemeral key it reads everything: nothing else keeps it out.
func TestForwardSecrecy(t *testing.T) {
	dir := t.TempDir()
	create := func(name string) *identity.Private {
		t.Helper()
		v, err := identity.OpenVault(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		p, err := v.Create(name)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := p.ChannelKey(); err != nil {
			t.Fatal(err)
		}
		return p
	}
	alice, bob := create("alice"), create("bob")
	before := files(t, dir)

	var mu sync.Mutex
	ephemeral := make(map[string]ephemeralKey)
	as := func(name string, p *identity.Private) func(*Config) {
		return func(c *Config) {
			c.Identity = p
			c.hooks.ephemeral = func() (keyPair, error) {
				e, err := newEphemeral()
				if err == nil {
					mu.Lock()
					ephemeral[name], _ = e.(ephemeralKey)
					mu.Unlock()
				}
				return e, err
			}
		}
	}
	n := newTestNet()
	a, b := n.party(t, "alice", as("alice", alice)), n.party(t, "bob", as("bob", bob))
	if _, err := b.ep.Listen("listener", TrustIdentifiers(alice.Identifier()), ListenOptions{}); err != nil {
		t.Fatal(err)
	}
	ab := dial(t, a, "bob", DialOptions{})
	const each = 100 // the keys change every 32
	for i := range each {
		send(t, ab, fmt.Sprintf("the code is %04d", i))
		b.next(t)
		if err := only(t, b).Send(t.Context(), route.To("x"), nil, fmt.Appendf(nil, "noted %04d", i)); err != nil {
			t.Fatal(err)
		}
		a.next(t)
	}
	if err := ab.Close(); err != nil {
		t.Fatal(err)
	}
	rec := recording{aliceSaid: "the code is 0070", bobsWord: "noted 0070"}
	for i, p := range n.seen("alice") {
		switch i {
		case 0:
			rec.m1 = p.frame.Payload
		case 1:
			rec.m3 = p.frame.Payload
		default:
			rec.fromAlice = append(rec.fromAlice, p.frame.Payload)
		}
	}
	for i, p := range n.seen("bob") {
		if i == 0 {
			rec.m2 = p.frame.Payload
		} else {
			rec.fromBob = append(rec.fromBob, p.frame.Payload)
		}
	}
	all := len(rec.fromAlice) + len(rec.fromBob)
	if all < 2*each {
		t.Fatalf("only %d frames recorded", all)
	}

	// What was kept: nothing that was not there before.
	after := files(t, dir)
	if len(after) != len(before) {
		t.Errorf("%d files before the conversation, %d after it", len(before), len(after))
	}
	for name, text := range after {
		if !bytes.Equal(text, before[name]) {
			t.Errorf("%s has changed", name)
		}
	}

	// What is stolen, loaded as the owners' programs would.
	loot := func(name string) (*identity.Private, *identity.ChannelKey) {
		t.Helper()
		copied := filepath.Join(t.TempDir(), name)
		if err := os.CopyFS(copied, os.DirFS(filepath.Join(dir, name))); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(copied, 0o700); err != nil {
			t.Fatal(err)
		}
		v, err := identity.OpenVault(copied)
		if err != nil {
			t.Fatal(err)
		}
		for file := range files(t, copied) {
			if err := os.Chmod(file, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		p, err := v.Load(name)
		if err != nil {
			t.Fatal(err)
		}
		k, err := p.ChannelKey()
		if err != nil {
			t.Fatal(err)
		}
		return p, k
	}
	aliceLoot, ka := loot("alice")
	bobLoot, kb := loot("bob")
	ea, eb := ephemeral["alice"], ephemeral["bob"]
	dh := func(k keyPair, peer [keyLen]byte) []byte {
		t.Helper()
		secret, err := k.DH(peer[:])
		if err != nil {
			t.Fatal(err)
		}
		return secret
	}
	es, se := dh(kb, ea.Public()), dh(ka, eb.Public())

	// One ephemeral key more, and everything is read: the attempts below fail for want of
	// that alone.
	for name, try := range map[string]func() (int, bool){
		"bob's":   func() (int, bool) { return rec.asBob(eb, kb) },
		"alice's": func() (int, bool) { return rec.asAlice(ea, ka) },
		"their secret": func() (int, bool) {
			_, opened, read := rec.withSecrets(dh(ea, eb.Public()), es, se)
			return opened, read
		},
	} {
		if opened, read := try(); opened != all || !read {
			t.Fatalf("with %s ephemeral key only %d of %d frames open", name, opened, all)
		}
	}

	// Every 32 bytes of the vaults as a key.
	keys := []keyPair{ka, kb}
	for _, text := range after {
		block, _ := pem.Decode(text)
		if block == nil {
			continue // locks and the like
		}
		for i := 0; i+keyLen <= len(block.Bytes); i++ {
			if k, err := ecdh.X25519().NewPrivateKey(block.Bytes[i : i+keyLen]); err == nil {
				keys = append(keys, ephemeralKey{k})
			}
		}
	}
	if len(keys) < 500 {
		t.Fatalf("only %d keys to try", len(keys))
	}
	own := 0
	for _, k := range keys {
		if p := k.Public(); p == ka.Public() || p == kb.Public() {
			own++
		}
		if n, _ := rec.asBob(k, kb); n != 0 {
			t.Error("a key of the vaults is bob's ephemeral one")
		}
		if n, _ := rec.asAlice(k, ka); n != 0 {
			t.Error("a key of the vaults is alice's ephemeral one")
		}
		for _, public := range [][keyLen]byte{ea.Public(), eb.Public()} {
			secret, err := k.DH(public[:])
			if err != nil {
				continue
			}
			if readable, opened, _ := rec.withSecrets(secret, es, se); readable || opened != 0 {
				t.Errorf("a key of the vaults opens message 2 (%v) and %d frames", readable, opened)
			}
		}
	}
	if own < 4 { // as loaded, and as they stand in the files
		t.Errorf("the purpose keys were tried %d times", own)
	}

	// The recorded messages, played to handshakes of ours with the stolen keys.
	i, r := handshakes(t, aliceLoot, bobLoot)
	if m2, err := r.ReadFirst(rec.m1); err != nil || bytes.Equal(m2, rec.m2) {
		t.Errorf("message 1 again: the same answer, or %v", err)
	}
	if err := r.ReadFinal(rec.m3); err == nil || r.Phase() == PhaseComplete {
		t.Errorf("message 3 again: %v", err)
	}
	if _, err := i.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := i.ReadReply(rec.m2); err == nil || i.Phase() == PhaseComplete {
		t.Errorf("message 2 again: %v", err)
	}
	// The stolen keys are the owners': with each other they do complete a handshake, and
	// its keys are others.
	i, r = handshakes(t, aliceLoot, bobLoot)
	ok := step[[]byte](t)
	if err := r.ReadFinal(ok(i.ReadReply(ok(r.ReadFirst(ok(i.Start())))))); err != nil {
		t.Fatal(err)
	}
	for _, h := range []*Handshake{i, r} {
		if h.e != nil || h.x != (xx{}) {
			t.Error("a complete handshake keeps its ephemeral key or what it has worked out")
		}
		res := step[Result](t)(h.Result())
		for _, f := range append(append([][]byte(nil), rec.fromAlice...), rec.fromBob...) {
			if _, _, err := res.Opener.Open(nil, f); err == nil {
				t.Error("a new handshake opens a recorded frame")
			}
		}
	}
}

// TestOldKeysAreGone: who takes a device while a channel is open has the keys of the last
// two times 32 frames, and none from before.
func TestOldKeysAreGone(t *testing.T) {
	s, o := NewSealer([keyLen]byte{1}), NewOpener([keyLen]byte{1})
	var frames [][]byte
	for range 200 {
		f, err := s.Seal(nil, []byte("text"))
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := o.Open(nil, f); err != nil {
			t.Fatal(err)
		}
		frames = append(frames, f)
	}
	opens := func(aead cipher.AEAD, i int) bool {
		nonce := gcmNonce(uint64(i))
		_, err := aead.Open(nil, nonce[:], frames[i][nonceLen:], nil)
		return err == nil
	}
	for i := range frames {
		if sends := opens(s.key.aead, i); sends != (i >= 192) {
			t.Errorf("frame %d: the sender's key opens it: %v", i, sends)
		}
		if has := opens(o.cur.aead, i) || opens(o.prev.aead, i) || o.ahead.aead != nil && opens(o.ahead.aead, i); has != (i >= 160) {
			t.Errorf("frame %d: the receiver's keys open it: %v", i, has)
		}
	}
}

// files returns the files below a folder, by path.
func files(t *testing.T, dir string) map[string][]byte {
	t.Helper()
	all := make(map[string][]byte)
	err := filepath.WalkDir(dir, func(name string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		all[name], err = os.ReadFile(name)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}
