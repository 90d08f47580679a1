package identity

import (
	"testing"
	"time"
)

func BenchmarkCreate(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Create(); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkPeer is what a handshake costs here for one side: a history and an
// attestation, one signature each.
func BenchmarkPeer(b *testing.B) {
	p := must(Create())
	k := must(p.ChannelKey())
	shown := k.AppendPresentation(nil)
	for name, importing := range map[string]func([]byte) (*Identity, error){
		"unknown": Import,
		"known": func() func([]byte) (*Identity, error) {
			r := NewMemoryRegistry(0)
			if err := r.Update(p.Identity()); err != nil {
				b.Fatal(err)
			}
			return r.Import
		}(),
	} {
		b.Run(name, func(b *testing.B) {
			now := time.Now()
			b.ReportAllocs()
			for b.Loop() {
				s, err := ParsePresentation(shown)
				if err != nil {
					b.Fatal(err)
				}
				id, err := importing(s.History)
				if err != nil {
					b.Fatal(err)
				}
				if _, err := VerifyChannelAttestation(s.Attestation, id, now); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkChannelKey(b *testing.B) {
	memory := must(Create())
	file := must(newVault(b).Create("x"))
	for name, p := range map[string]*Private{"memory": memory, "vault": file} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := p.ChannelKey(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkVerifyCredential(b *testing.B) {
	p := must(Create())
	id := p.Identity()
	cred := must(p.IssueCredential(id, map[string]string{"role": "member"}, 1, time.Hour))
	now := time.Now()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := VerifyCredential(cred, id.Identifier(), []*Identity{id}, now); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkIssueCredential(b *testing.B) {
	p := must(Create())
	id := p.Identity()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := p.IssueCredential(id, map[string]string{"role": "member"}, 1, time.Hour); err != nil {
			b.Fatal(err)
		}
	}
}
