// Package identity makes and verifies Ockam identities: identifiers, change
// histories, purpose keys, credentials, and the files that hold secret keys.
// Devices, hubs and authorities use it; package channel uses it to know whom it
// talks to.
//
// Create makes an identity in memory, and a Vault keeps identities in files:
//
//	vault, err := identity.OpenVault(dir)
//	alice, err := vault.Create("alice") // or vault.Load("alice")
//	fmt.Println(alice.Identifier())
//
// What others show is verified with Import (a change history),
// VerifyChannelAttestation, VerifyCredential and Identity.Verify, and a
// Registry remembers the longest history seen of each identity, so that nobody
// can present a key that was rotated away.
//
// # Wire
//
// Histories, attestations and credentials are byte for byte those of Rust Ockam
// (crates ockam 0.128 and later): what we emit is what a Rust node emits, and
// what we accept is what its decoder accepts, within the limits of the Max
// constants. Signed bytes are hashed as received and never encoded again.
//
// # Security
//
// Secret keys never print, in no formatting verb, logger or encoder. Keys at
// rest are files of mode 0600, refused when others can read them, encrypted with
// a passphrase or key file when asked. The package does not lock memory or
// promise that secrets are erased from it: Go moves what it likes. Keys that
// must not be in memory at all belong into a device behind Signer and Exchanger.
//
// Verification decides authenticity, not trust: anybody can make an identity.
//
// # Concurrency
//
// Identity, PublicKey, ChannelKey and Credential values are immutable. Private,
// Vault and the registries are safe for concurrent use, and several processes
// may open the same vault or registry at once.
package identity
