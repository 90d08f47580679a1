package main

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/sealmq/sealmq/broker"
	"github.com/sealmq/sealmq/identity"
)

// defaultSchema is the schema number of credentials unless another is asked for:
// that of Ockam's project members.
const defaultSchema = 1

// credentialInfo is a credential as it is shown.
type credentialInfo struct {
	Subject    string            `json:"subject"`
	Issuer     string            `json:"issuer"`
	Schema     uint64            `json:"schema"`
	Attributes map[string]string `json:"attributes"`
	CreatedAt  time.Time         `json:"created_at"`
	ExpiresAt  time.Time         `json:"expires_at"`
	// Verified says that an authority given with --authority has issued it and
	// that it holds now.
	Verified bool `json:"verified"`
}

func (a *app) authorityCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "authority",
		Short: "Create an authority, issue and inspect credentials, offline",
		Long: `An authority is an identity whose word peers and hubs take: it issues credentials
that say something about other identities. Nothing here needs a server or a
network; authorities are kept in $SEALMQ_HOME/authorities, best on a machine that
does nothing else.

Rotating an authority's key ends every credential that it has issued.`,
		Example: `  sealmq authority create plant
  sealmq authority show plant > plant.authority     # for --authority
  sealmq identity show --history bob > bob.identity # on Bob's machine
  sealmq authority issue plant --subject bob.identity --attribute role=pump > bob.credential
  sealmq authority inspect bob.credential --authority plant.authority
  sealmq send --to forward_to_bob --authority plant.authority --attribute role=pump 'Hello'`,
		Args: noSuchCommand,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(a.authorityCreate(), a.authorityShow(), a.authorityIssue(), a.authorityInspect(), a.authorityRotate())
	a.addKeyFlags(c.PersistentFlags())
	return c
}

// authorities opens the folder with the authorities.
func (a *app) authorities() (*identity.Vault, error) {
	home, err := a.home()
	if err != nil {
		return nil, err
	}
	return a.openVault(filepath.Join(home, "authorities"))
}

// authorityError is vaultError for authorities.
func authorityError(name string, err error) error {
	switch {
	case errors.Is(err, identity.ErrNotFound):
		return coded(exitNoInput, fmt.Errorf("there is no authority %q", name), "sealmq authority create "+name)
	case errors.Is(err, identity.ErrExists):
		return coded(exitCantCreate, fmt.Errorf("the authority %q exists already", name), "it is never overwritten: choose another name")
	}
	return vaultError(name, err)
}

func (a *app) loadAuthority(name string) (*identity.Private, error) {
	v, err := a.authorities()
	if err != nil {
		return nil, err
	}
	p, err := v.Load(name)
	if err != nil {
		return nil, authorityError(name, err)
	}
	return p, nil
}

func (a *app) authorityCreate() *cobra.Command {
	return &cobra.Command{
		Use:     "create NAME",
		Short:   "Create an authority and print its identifier",
		Example: "  sealmq authority create plant --passphrase-file secret",
		Args:    exactArgs("a name"),
		RunE: func(_ *cobra.Command, args []string) error {
			v, err := a.authorities()
			if err != nil {
				return err
			}
			p, err := v.Create(args[0])
			if err != nil {
				return authorityError(args[0], err)
			}
			return a.result(infoOf(args[0], p.Identity()), p.Identifier().String())
		},
	}
}

func (a *app) authorityShow() *cobra.Command {
	return &cobra.Command{
		Use:     "show NAME",
		Short:   "Print an authority's change history, for --authority; there is no secret in it",
		Example: "  sealmq authority show plant > plant.authority",
		Args:    exactArgs("a name"),
		RunE: func(_ *cobra.Command, args []string) error {
			v, err := a.authorities()
			if err != nil {
				return err
			}
			id, err := v.Identity(args[0])
			if err != nil {
				return authorityError(args[0], err)
			}
			info := infoOf(args[0], id)
			return a.result(info, info.ChangeHistory)
		},
	}
}

func (a *app) authorityIssue() *cobra.Command {
	var subject, local string
	var attrs []string
	var ttl time.Duration
	var schema uint64
	c := &cobra.Command{
		Use:   "issue NAME",
		Short: "Issue a credential and print it",
		Long: `Issues a credential about another identity and prints it in hexadecimal digits,
for --credential. There is no secret in it, but it says what its attributes say.`,
		Example: `  sealmq authority issue plant --subject bob.identity --attribute role=pump --ttl 720h > bob.credential
  ssh bob sealmq identity show --history | sealmq authority issue plant --subject - > bob.credential`,
		Args: exactArgs("the authority's name"),
		RunE: func(_ *cobra.Command, args []string) error {
			about, err := attributes(attrs)
			if err != nil {
				return err
			}
			who, err := a.subject(subject, local)
			if err != nil {
				return err
			}
			authority, err := a.loadAuthority(args[0])
			if err != nil {
				return err
			}
			cred, err := authority.IssueCredential(who, about, schema, ttl)
			switch {
			case errors.Is(err, identity.ErrKeyExpired):
				return coded(exitConfig, err, "choose a shorter --ttl, or rotate the authority's key, which ends all credentials that it has issued: sealmq authority rotate "+args[0])
			case err != nil:
				return coded(exitUsage, err, "for example --ttl 720h --schema 1")
			}
			in, err := identity.InspectCredential(cred)
			if err != nil {
				return err
			}
			info := struct {
				credentialInfo
				Credential string `json:"credential"`
			}{showCredential(in), hex.EncodeToString(cred)}
			return a.result(info, info.Credential)
		},
	}
	f := c.Flags()
	f.StringVar(&subject, "subject", "", "file with the change history of whom it is about (sealmq identity show --history); - for standard input")
	f.StringVar(&local, "identity", "", "name of an identity on this machine that it is about")
	f.StringArrayVar(&attrs, "attribute", nil, "NAME=VALUE that it says; may be repeated")
	f.DurationVar(&ttl, "ttl", identity.CredentialTTL, "how long it is valid from now")
	f.Uint64Var(&schema, "schema", defaultSchema, "schema number, which says what the attributes mean")
	c.MarkFlagsMutuallyExclusive("subject", "identity")
	return c
}

// subject is whom a credential is to be about.
func (a *app) subject(file, local string) (*identity.Identity, error) {
	var history []byte
	var err error
	switch {
	case local != "":
		v, err := a.vault()
		if err != nil {
			return nil, err
		}
		id, err := v.Identity(local)
		if err != nil {
			return nil, vaultError(local, err)
		}
		return id, nil
	case file == "":
		return nil, usagef("--subject FILE, made by sealmq identity show --history", "say whom the credential is about")
	case file == "-":
		text, rerr := io.ReadAll(io.LimitReader(a.stdin, maxSecretFile))
		if rerr != nil {
			return nil, coded(exitIO, fmt.Errorf("read the subject: %w", rerr), "")
		}
		history, err = decodeHex(text, "standard input")
	default:
		history, err = readHex(file, "the subject")
	}
	if err != nil {
		return nil, err
	}
	id, err := identity.Import(history)
	if err != nil {
		return nil, coded(exitData, fmt.Errorf("the subject: %w", err), "make the file with: sealmq identity show --history NAME")
	}
	return id, nil
}

func showCredential(in *identity.Inspection) credentialInfo {
	return credentialInfo{
		Subject: in.Subject.String(), Issuer: in.Issuer.String(), Schema: in.Schema, Attributes: in.Attributes,
		CreatedAt: in.CreatedAt.UTC(), ExpiresAt: in.ExpiresAt.UTC(),
	}
}

func (a *app) authorityInspect() *cobra.Command {
	var by []string
	c := &cobra.Command{
		Use:   "inspect FILE",
		Short: "Print what a credential says, and with --authority whether it is true",
		Example: `  sealmq authority inspect bob.credential
  sealmq authority inspect bob.credential --authority plant.authority`,
		Args: exactArgs("a file"),
		RunE: func(_ *cobra.Command, args []string) error {
			cred, err := readHex(args[0], "the credential")
			if err != nil {
				return err
			}
			in, err := identity.InspectCredential(cred)
			if err != nil {
				return coded(exitData, err, "")
			}
			info := showCredential(in)
			if len(by) > 0 {
				if err := verifyCredential(cred, by, in); err != nil {
					return err
				}
				info.Verified = true
			}
			return a.result(info, describeCredential(info))
		},
	}
	c.Flags().StringSliceVar(&by, "authority", nil, "verify that this authority issued it: a file made by sealmq authority show; may be repeated")
	return c
}

// verifyCredential says why a credential does not hold.
func verifyCredential(cred []byte, files []string, in *identity.Inspection) error {
	var authorities []*identity.Identity
	for _, name := range files {
		authority, err := broker.LoadAuthority(name)
		if err != nil {
			return err
		}
		authorities = append(authorities, authority)
	}
	_, err := identity.VerifyCredential(cred, in.Subject, authorities, time.Now())
	switch {
	case errors.Is(err, identity.ErrNotLatestKey):
		return coded(exitNoPerm, err, "the authority has been rotated: take its new file and have the credential issued again")
	case err != nil:
		return coded(exitNoPerm, err, "")
	}
	return nil
}

func describeCredential(c credentialInfo) string {
	var b strings.Builder
	fmt.Fprintf(&b, "Subject: %s\nIssuer:  %s\nSchema:  %d\nValid:   %s to %s", c.Subject, c.Issuer, c.Schema,
		c.CreatedAt.Format(time.RFC3339), c.ExpiresAt.Format(time.RFC3339))
	for _, name := range slices.Sorted(maps.Keys(c.Attributes)) {
		fmt.Fprintf(&b, "\nSays:    %s=%s", printable(name), printable(c.Attributes[name]))
	}
	if c.Verified {
		b.WriteString("\nVerified")
	} else {
		b.WriteString("\nNot verified: give --authority")
	}
	return b.String()
}

func (a *app) authorityRotate() *cobra.Command {
	var sure bool
	c := &cobra.Command{
		Use:   "rotate NAME",
		Short: "Give an authority a new key; this ends every credential that it has issued",
		Long: `Gives an authority a new key, as after the old one was stolen. Its identifier
stays. Every credential that it has issued is refused from then on by whoever has
seen the new history, so each subject needs a new one, and everybody who trusts
the authority needs its new file (sealmq authority show).`,
		Example: "  sealmq authority rotate plant --end-all-credentials",
		Args:    exactArgs("a name"),
		RunE: func(_ *cobra.Command, args []string) error {
			if !sure {
				return usagef("if that is what you want: sealmq authority rotate "+args[0]+" --end-all-credentials",
					"rotating the authority %q ends every credential that it has issued", args[0])
			}
			v, err := a.authorities()
			if err != nil {
				return err
			}
			if err := v.Rotate(args[0]); err != nil {
				return authorityError(args[0], err)
			}
			a.note("warning: every credential issued by %q before now has ended; issue new ones, and hand out its new file: sealmq authority show %s", args[0], args[0])
			p, err := v.Identity(args[0])
			if err != nil {
				return authorityError(args[0], err)
			}
			return a.result(identityInfo{Name: args[0], Identifier: p.String()}, p.String())
		},
	}
	c.Flags().BoolVar(&sure, "end-all-credentials", false, "yes, end every credential that it has issued")
	return c
}
