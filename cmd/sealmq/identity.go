package main

import (
	"cmp"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/sealmq/sealmq/identity"
)

// defaultIdentity is the identity that listen and send use, and create when it
// does not exist yet, unless --identity names another.
const defaultIdentity = "default"

// identityInfo is how an identity is shown.
type identityInfo struct {
	Name       string `json:"name"`
	Identifier string `json:"identifier"`
	// ChangeHistory is hex, as other Ockam tools take it.
	ChangeHistory string `json:"change_history,omitempty"`
}

func infoOf(name string, id *identity.Identity) identityInfo {
	return identityInfo{Name: name, Identifier: id.String(), ChangeHistory: hex.EncodeToString(id.ChangeHistory())}
}

func (a *app) identityCommand() *cobra.Command {
	c := &cobra.Command{
		Use:     "identity",
		Aliases: []string{"id"},
		Short:   "Create, show, protect and back up identities",
		Long: `An identity is a key pair and its history; its identifier is what peers name in
--trust. Identities are kept in the folder $SEALMQ_HOME (by default in the
user's configuration folder), in files that only their owner can read, encrypted
where --passphrase-file or --key-file says so.`,
		Example: "  sealmq identity create alice\n  sealmq identity show alice\n  sealmq identity create bob --passphrase-file secret",
		Args:    noSuchCommand,
		RunE:    func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(
		&cobra.Command{
			Use:     "create NAME",
			Short:   "Create an identity and print its identifier",
			Example: "  sealmq identity create alice",
			Args:    exactArgs("a name"),
			RunE:    func(_ *cobra.Command, args []string) error { return a.createIdentity(args[0]) },
		},
		a.showCommand(),
		&cobra.Command{
			Use:     "list",
			Short:   "List the identities of this vault",
			Example: "  sealmq identity list",
			Args:    noArgs,
			RunE:    func(*cobra.Command, []string) error { return a.listIdentities() },
		},
	)
	c.AddCommand(a.keyCommands()...)
	a.addKeyFlags(c.PersistentFlags())
	c.PersistentFlags().StringVar(&a.folder, "vault", "", "folder with the identities (default $"+envHome+"/identities); that of a hub, named hub, is identity in its data folder")
	return c
}

// vaultDir is the folder with the identities.
func (a *app) vaultDir() (string, error) {
	if a.folder != "" {
		return a.folder, nil
	}
	home, err := a.home()
	if err != nil {
		return "", err
	}
	return filepath.Join(home, "identities"), nil
}

func (a *app) vault() (*identity.Vault, error) {
	dir, err := a.vaultDir()
	if err != nil {
		return nil, err
	}
	return a.openVault(dir)
}

func (a *app) createIdentity(name string) error {
	v, err := a.vault()
	if err != nil {
		return err
	}
	p, err := v.Create(name)
	if err != nil {
		return vaultError(name, err)
	}
	return a.result(infoOf(name, p.Identity()), p.Identifier().String())
}

func (a *app) loadIdentity(name string) (*identity.Private, error) {
	v, err := a.vault()
	if err != nil {
		return nil, err
	}
	p, err := v.Load(name)
	if err != nil {
		return nil, vaultError(name, err)
	}
	return p, nil
}

// useIdentity loads an identity for a command that needs one. The default one
// is created at first use, where create allows it: nobody has a credential for a new one.
func (a *app) useIdentity(name string, create bool) (*identity.Private, error) {
	v, err := a.vault()
	if err != nil {
		return nil, err
	}
	p, err := v.Load(name)
	if errors.Is(err, identity.ErrNotFound) && name == defaultIdentity && create {
		if p, err = v.Create(name); err == nil {
			a.note("created the identity %q: %v", name, p.Identifier())
		} else if errors.Is(err, identity.ErrExists) { // another sealmq was faster
			p, err = v.Load(name)
		}
	}
	if err != nil {
		return nil, vaultError(name, err)
	}
	return p, nil
}

func (a *app) listIdentities() error {
	v, err := a.vault()
	if err != nil {
		return err
	}
	names, err := v.List()
	if err != nil {
		return vaultError("", err)
	}
	var bad error // the others are listed all the same
	for _, name := range names {
		id, err := v.Identity(name)
		if err != nil {
			bad = cmp.Or(bad, vaultError(name, err))
			continue
		}
		info := infoOf(name, id)
		info.ChangeHistory = ""
		if err := a.result(info, info.Identifier+"  "+name); err != nil {
			return err
		}
	}
	return bad
}

// vaultError gives an error of the vault its exit code.
func vaultError(name string, err error) error {
	if sealed := sealedError(name, err); sealed != nil {
		return sealed
	}
	var permission *identity.PermissionError
	switch {
	case errors.As(err, &permission):
		return coded(exitNoPerm, err, "")
	case errors.Is(err, identity.ErrNotFound):
		return coded(exitNoInput, fmt.Errorf("there is no identity %q", name), "sealmq identity create "+name)
	case errors.Is(err, identity.ErrExists):
		return coded(exitCantCreate, fmt.Errorf("the identity %q exists already", name), "it is never overwritten: choose another name, or use sealmq identity show "+name)
	case errors.Is(err, identity.ErrName):
		return coded(exitUsage, err, "")
	case errors.Is(err, fs.ErrPermission):
		return coded(exitNoPerm, err, "give it to the user who runs this, or set "+envHome+" to a folder of your own")
	}
	return err
}

// completeIdentity completes an identity's name.
func (a *app) completeIdentity(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	v, err := a.vault()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	names, err := v.List()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}
