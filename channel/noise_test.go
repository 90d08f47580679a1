package channel

import (
	"bytes"
	"crypto/ecdh"
	"testing"

	"github.com/flynn/noise"

	"github.com/sealmq/sealmq/internal/vectors"
)

func testKey(t testing.TB, raw []byte) keyPair {
	t.Helper()
	priv, err := ecdh.X25519().NewPrivateKey(raw)
	if err != nil {
		t.Fatal(err)
	}
	return ephemeralKey{priv}
}

func key32(t testing.TB, b []byte) [32]byte {
	t.Helper()
	if len(b) != 32 {
		t.Fatalf("vector key has %d bytes", len(b))
	}
	return [32]byte(b)
}

func wantBytes(t testing.TB, what string, got, want []byte) {
	t.Helper()
	if !bytes.Equal(got, want) {
		t.Errorf("%s:\n got %x\nwant %x", what, got, want)
	}
}

func TestHKDFVector(t *testing.T) {
	v := vectors.Load[struct {
		Vector struct{ Salt, IKM, K1, K2 vectors.Hex }
	}](t, "hkdf_upstream.json").Vector
	salt := key32(t, v.Salt)
	a, b := hkdf2(&salt, v.IKM)
	wantBytes(t, "k1", a[:], v.K1)
	wantBytes(t, "k2", b[:], v.K2)
}

type stateVector struct {
	CK vectors.Hex `json:"ck"`
	H  vectors.Hex `json:"h"`
	K  vectors.Hex `json:"k"`
	N  uint64      `json:"n"`
}

type noiseVector struct {
	ProtocolName string      `json:"protocol_name_ascii"`
	CKInitial    vectors.Hex `json:"ck_initial"`
	HInitial     vectors.Hex `json:"h_initial"`
	IE           vectors.Hex `json:"initiator_ephemeral_private"`
	IS           vectors.Hex `json:"initiator_static_private"`
	ISPublic     vectors.Hex `json:"initiator_static_public"`
	RE           vectors.Hex `json:"responder_ephemeral_private"`
	RS           vectors.Hex `json:"responder_static_private"`
	RSPublic     vectors.Hex `json:"responder_static_public"`
	M1           struct {
		Payload vectors.Hex `json:"payload"`
		Wire    vectors.Hex `json:"wire"`
		H       vectors.Hex `json:"h_after"`
	} `json:"message1"`
	M2    noiseMessage `json:"message2"`
	M3    noiseMessage `json:"message3"`
	Split struct {
		K1        vectors.Hex `json:"k1"`
		K2        vectors.Hex `json:"k2"`
		IEncrypts vectors.Hex `json:"initiator_encryption_key"`
		IDecrypts vectors.Hex `json:"initiator_decryption_key"`
		REncrypts vectors.Hex `json:"responder_encryption_key"`
		RDecrypts vectors.Hex `json:"responder_decryption_key"`
	} `json:"split"`
}

type noiseMessage struct {
	Payload vectors.Hex `json:"payload"`
	Wire    vectors.Hex `json:"wire"`
	After   stateVector `json:"state_after"`
}

func (v *stateVector) check(t *testing.T, who string, s symmetric) {
	t.Helper()
	wantBytes(t, who+" ck", s.ck[:], v.CK)
	wantBytes(t, who+" h", s.h[:], v.H)
	wantBytes(t, who+" k", s.k[:], v.K)
	if s.n != v.N {
		t.Errorf("%s n = %d, want %d", who, s.n, v.N)
	}
}

// runNoise replays a handshake in both roles and checks every intermediate.
func runNoise(t *testing.T, v *noiseVector) {
	t.Helper()
	var name [32]byte
	copy(name[:], v.ProtocolName)
	ie, is := testKey(t, v.IE), testKey(t, v.IS)
	re, rs := testKey(t, v.RE), testKey(t, v.RS)
	start := xx{sym: newSymmetric(name)}
	wantBytes(t, "initial ck", start.sym.ck[:], v.CKInitial)
	wantBytes(t, "initial h", start.sym.h[:], v.HInitial)

	must := func(x xx, out []byte, err error) (xx, []byte) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return x, out
	}
	i, wire := must(start.write1(ie, v.M1.Payload))
	wantBytes(t, "message 1", wire, v.M1.Wire)
	wantBytes(t, "h after 1", i.sym.h[:], v.M1.H)
	r, payload := must(start.read1(wire))
	wantBytes(t, "payload 1", payload, v.M1.Payload)
	wantBytes(t, "responder h after 1", r.sym.h[:], v.M1.H)

	r, wire = must(r.write2(re, rs, v.M2.Payload))
	wantBytes(t, "message 2", wire, v.M2.Wire)
	v.M2.After.check(t, "responder after 2", r.sym)
	i, payload = must(i.read2(ie, wire))
	wantBytes(t, "payload 2", payload, v.M2.Payload)
	wantBytes(t, "responder's static key", i.rs[:], v.RSPublic)
	v.M2.After.check(t, "initiator after 2", i.sym)

	i, wire = must(i.write3(is, v.M3.Payload))
	wantBytes(t, "message 3", wire, v.M3.Wire)
	v.M3.After.check(t, "initiator after 3", i.sym)
	r, payload = must(r.read3(re, wire))
	wantBytes(t, "payload 3", payload, v.M3.Payload)
	wantBytes(t, "initiator's static key", r.rs[:], v.ISPublic)
	v.M3.After.check(t, "responder after 3", r.sym)

	for _, x := range []xx{i, r} {
		k1, k2 := x.split()
		wantBytes(t, "k1: responder sends", k1[:], v.Split.K1)
		wantBytes(t, "k1: responder sends", k1[:], v.Split.REncrypts)
		wantBytes(t, "k1: initiator opens", k1[:], v.Split.IDecrypts)
		wantBytes(t, "k2: initiator sends", k2[:], v.Split.K2)
		wantBytes(t, "k2: initiator sends", k2[:], v.Split.IEncrypts)
		wantBytes(t, "k2: responder opens", k2[:], v.Split.RDecrypts)
	}
}

func TestNoiseDerivedVectors(t *testing.T) {
	file := vectors.Load[struct {
		Cases []struct {
			Name string
			V    noiseVector
		}
	}](t, "noise_handshake_derived.json")
	if len(file.Cases) == 0 {
		t.Fatal("no cases")
	}
	for _, c := range file.Cases {
		t.Run(c.Name, func(t *testing.T) { runNoise(t, &c.V) })
	}
	channel := vectors.Load[struct{ Handshake noiseVector }](t, "secure_channel_derived.json")
	t.Run("secure_channel_derived", func(t *testing.T) { runNoise(t, &channel.Handshake) })
}

func TestNoiseUpstreamVectors(t *testing.T) {
	type fixed struct {
		IS vectors.Hex `json:"initiator_static_key"`
		IE vectors.Hex `json:"initiator_ephemeral_key"`
		RS vectors.Hex `json:"responder_static_key"`
		RE vectors.Hex `json:"responder_ephemeral_key"`
		P1 vectors.Hex `json:"message1_payload"`
		M1 vectors.Hex `json:"message1_ciphertext"`
		P2 vectors.Hex `json:"message2_payload"`
		M2 vectors.Hex `json:"message2_ciphertext"`
		P3 vectors.Hex `json:"message3_payload"`
		M3 vectors.Hex `json:"message3_ciphertext"`
	}
	file := vectors.Load[struct {
		Name           vectors.Hex `json:"protocol_name_padded_hex"`
		Initialization struct{ CK, H vectors.Hex }
		One            fixed `json:"test_full_handshake1"`
		Two            fixed `json:"test_full_handshake2"`
	}](t, "noise_handshake_upstream.json")
	start := xx{sym: newSymmetric(key32(t, file.Name))}
	wantBytes(t, "ck", start.sym.ck[:], file.Initialization.CK)
	wantBytes(t, "h", start.sym.h[:], file.Initialization.H)
	for _, f := range []fixed{file.One, file.Two} {
		ie, is, re, rs := testKey(t, f.IE), testKey(t, f.IS), testKey(t, f.RE), testKey(t, f.RS)
		i, m1, err := start.write1(ie, f.P1)
		if err != nil {
			t.Fatal(err)
		}
		wantBytes(t, "message 1", m1, f.M1)
		r, _, err := start.read1(m1)
		if err != nil {
			t.Fatal(err)
		}
		r, m2, err := r.write2(re, rs, f.P2)
		if err != nil {
			t.Fatal(err)
		}
		wantBytes(t, "message 2", m2, f.M2)
		if i, _, err = i.read2(ie, m2); err != nil {
			t.Fatal(err)
		}
		_, m3, err := i.write3(is, f.P3)
		if err != nil {
			t.Fatal(err)
		}
		wantBytes(t, "message 3", m3, f.M3)
		if _, p3, err := r.read3(re, m3); err != nil {
			t.Fatal(err)
		} else {
			wantBytes(t, "payload 3", p3, f.P3)
		}
	}
}

// TestOracle holds the handshake against flynn/noise, with the standard name and
// fresh keys, each implementation in each role.
func TestOracle(t *testing.T) {
	var name [32]byte
	copy(name[:], "Noise_XX_25519_AESGCM_SHA256")
	suite := noise.NewCipherSuite(noise.DH25519, noise.CipherAESGCM, noise.HashSHA256)
	oracle := func(initiator bool) *noise.HandshakeState {
		static, err := suite.GenerateKeypair(nil)
		if err != nil {
			t.Fatal(err)
		}
		hs, err := noise.NewHandshakeState(noise.Config{
			CipherSuite: suite, Pattern: noise.HandshakeXX, Initiator: initiator, StaticKeypair: static,
		})
		if err != nil {
			t.Fatal(err)
		}
		return hs
	}
	fresh := func() keyPair {
		k, err := newEphemeral()
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	p := [][]byte{nil, []byte("two"), bytes.Repeat([]byte("three"), 200)}
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Run("we dial", func(t *testing.T) {
		them, e, s := oracle(false), fresh(), fresh()
		x, m1, err := xx{sym: newSymmetric(name)}.write1(e, p[0])
		check(err)
		_, _, _, err = them.ReadMessage(nil, m1)
		check(err)
		m2, _, _, err := them.WriteMessage(nil, p[1])
		check(err)
		x, got, err := x.read2(e, m2)
		check(err)
		wantBytes(t, "payload 2", got, p[1])
		x, m3, err := x.write3(s, p[2])
		check(err)
		got, first, second, err := them.ReadMessage(nil, m3)
		check(err)
		wantBytes(t, "payload 3", got, p[2])
		compareSplit(t, x, first, second)
	})
	t.Run("they dial", func(t *testing.T) {
		them, e, s := oracle(true), fresh(), fresh()
		m1, _, _, err := them.WriteMessage(nil, p[1])
		check(err)
		x, got, err := xx{sym: newSymmetric(name)}.read1(m1)
		check(err)
		wantBytes(t, "payload 1", got, p[1])
		x, m2, err := x.write2(e, s, p[2])
		check(err)
		got, _, _, err = them.ReadMessage(nil, m2)
		check(err)
		wantBytes(t, "payload 2", got, p[2])
		m3, first, second, err := them.WriteMessage(nil, p[1])
		check(err)
		x, got, err = x.read3(e, m3)
		check(err)
		wantBytes(t, "payload 3", got, p[1])
		compareSplit(t, x, first, second)
	})
}

func compareSplit(t *testing.T, x xx, first, second *noise.CipherState) {
	t.Helper()
	k1, k2 := x.split()
	a, b := first.UnsafeKey(), second.UnsafeKey()
	wantBytes(t, "first output", k1[:], a[:])
	wantBytes(t, "second output", k2[:], b[:])
	// Rekeying is the same function too.
	first.Rekey()
	again := first.UnsafeKey()
	key := newTransportKey(&k1)
	var scratch [48]byte
	next := key.next(&scratch)
	wantBytes(t, "rekeyed", next.raw[:], again[:])
}
