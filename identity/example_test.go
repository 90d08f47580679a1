package identity_test

import (
	"fmt"
	"log"
	"os"
	"path/filepath"
	"time"

	"github.com/sealmq/sealmq/identity"
)

// An identity is created once and loaded from then on.
func ExampleVault() {
	home, err := os.MkdirTemp("", "vault")
	if err != nil {
		log.Fatal(err)
	}
	defer func() { _ = os.RemoveAll(home) }()

	vault, err := identity.OpenVault(filepath.Join(home, "identities"))
	if err != nil {
		log.Fatal(err)
	}
	created, err := vault.Create("alice")
	if err != nil {
		log.Fatal(err)
	}
	loaded, err := vault.Load("alice")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(loaded.Identifier() == created.Identifier())

	_, err = vault.Create("alice")
	fmt.Println(err != nil)
	// Output:
	// true
	// true
}

// An authority issues a credential offline; whoever has the authority's change
// history verifies it.
func ExamplePrivate_IssueCredential() {
	authority, err := identity.Create()
	if err != nil {
		log.Fatal(err)
	}
	device, err := identity.Create()
	if err != nil {
		log.Fatal(err)
	}
	credential, err := authority.IssueCredential(device.Identity(), map[string]string{"role": "sensor"}, 1, identity.CredentialTTL)
	if err != nil {
		log.Fatal(err)
	}

	trusted, err := identity.Import(authority.Identity().ChangeHistory())
	if err != nil {
		log.Fatal(err)
	}
	c, err := identity.VerifyCredential(credential, device.Identifier(), []*identity.Identity{trusted}, time.Now())
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(c.Attributes["role"], c.Issuer == authority.Identifier())
	// Output: sensor true
}

// A registry refuses a history that is shorter than one seen before.
func ExampleMemoryRegistry() {
	peer, err := identity.Create()
	if err != nil {
		log.Fatal(err)
	}
	before := peer.Identity()
	if err := peer.Rotate(); err != nil {
		log.Fatal(err)
	}

	known := identity.NewMemoryRegistry(0)
	fmt.Println(known.Update(before))
	fmt.Println(known.Update(peer.Identity()))
	fmt.Println(known.Update(before) != nil)
	// Output:
	// <nil>
	// <nil>
	// true
}
