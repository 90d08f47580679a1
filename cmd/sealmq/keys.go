package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/sealmq/sealmq/identity"
)

// Environment variables for keys at rest.
const (
	envPassphrase     = "SEALMQ_PASSPHRASE"      //nolint:gosec // a variable's name, no secret
	envPassphraseFile = "SEALMQ_PASSPHRASE_FILE" //nolint:gosec // as above
	envKeyFile        = "SEALMQ_KEY_FILE"
)

// keyFlags say how secret keys are protected at rest.
type keyFlags struct{ passphraseFile, keyFile string }

func (a *app) addKeyFlags(f *pflag.FlagSet) {
	f.StringVar(&a.keys.passphraseFile, "passphrase-file", "", "file with the passphrase of the keys at rest (default $"+envPassphraseFile+", or the passphrase itself in $"+envPassphrase+")")
	f.StringVar(&a.keys.keyFile, "key-file", "", "file whose contents protect the keys at rest, made by sealmq identity key-file (default $"+envKeyFile+")")
}

// protection returns how keys at rest are protected: by flag, else by
// environment, else not.
func (a *app) protection() (identity.Protection, error) {
	k := a.keys
	if k == (keyFlags{}) {
		k = keyFlags{a.env(envPassphraseFile), a.env(envKeyFile)}
		if p := a.env(envPassphrase); p != "" {
			if k != (keyFlags{}) {
				return identity.Protection{}, usagef("set only one of "+envPassphrase+", "+envPassphraseFile+" and "+envKeyFile, "keys at rest have one protection")
			}
			protection, err := identity.Passphrase([]byte(p))
			return protection, keyError(err)
		}
	}
	return k.protection()
}

func (k keyFlags) protection() (identity.Protection, error) {
	switch {
	case k.passphraseFile != "" && k.keyFile != "":
		return identity.Protection{}, usagef("give a passphrase or a key file", "keys at rest have one protection")
	case k.passphraseFile != "":
		p, err := identity.PassphraseFile(k.passphraseFile)
		return p, keyError(err)
	case k.keyFile != "":
		p, err := identity.KeyFile(k.keyFile)
		return p, keyError(err)
	}
	return identity.Protection{}, nil
}

// keyError gives an error about a passphrase or a key file its exit code.
func keyError(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, identity.ErrNoPassphrase):
		return coded(exitData, err, "")
	case errors.Is(err, fs.ErrNotExist):
		return coded(exitNoInput, err, "")
	}
	return vaultError("", err)
}

// openVault opens a folder of identities with the protection that was asked for.
func (a *app) openVault(dir string) (*identity.Vault, error) {
	p, err := a.protection()
	if err != nil {
		return nil, err
	}
	v, err := identity.OpenVault(dir, identity.WithProtection(p))
	if err != nil {
		return nil, vaultError("", err)
	}
	return v, nil
}

// sealedError explains errors of protected keys; nil for other errors.
func sealedError(name string, err error) error {
	switch {
	case errors.Is(err, identity.ErrSealed):
		return coded(exitNoPerm, fmt.Errorf("the keys of %q are encrypted", name), "give --passphrase-file or --key-file, or set "+envPassphrase)
	case errors.Is(err, identity.ErrPassphrase):
		return coded(exitNoPerm, fmt.Errorf("the keys of %q do not open: wrong passphrase or key file, or the file was altered", name), "")
	}
	return nil
}

// keyCommands are the commands of identity that handle keys at rest.
func (a *app) keyCommands() []*cobra.Command {
	return []*cobra.Command{a.rotateCommand(), a.protectCommand(), a.exportCommand(), a.importCommand(), a.keyFileCommand()}
}

// showCommand needs no passphrase: what it shows is public.
func (a *app) showCommand() *cobra.Command {
	var history bool
	c := &cobra.Command{
		Use:   "show [NAME]",
		Short: "Print an identity's identifier, or with --history its change history",
		Example: `  sealmq identity show alice
  sealmq identity show --json alice
  sealmq identity show --history alice > alice.identity # for sealmq authority issue`,
		Args:              atMostOne,
		ValidArgsFunction: a.completeIdentity,
		RunE: func(_ *cobra.Command, args []string) error {
			name := defaultIdentity
			if len(args) == 1 {
				name = args[0]
			}
			v, err := a.vault()
			if err != nil {
				return err
			}
			id, err := v.Identity(name)
			if err != nil {
				return vaultError(name, err)
			}
			info := infoOf(name, id)
			if history {
				return a.result(info, info.ChangeHistory)
			}
			return a.result(info, info.Identifier)
		},
	}
	c.Flags().BoolVar(&history, "history", false, "print the change history in hexadecimal digits: all public keys, no secret")
	return c
}

func (a *app) rotateCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "rotate NAME",
		Short: "Give an identity a new key; its identifier stays",
		Long: `Gives an identity a new key, as after a machine was stolen or sold. Its identifier
stays, so peers need not be told. Whoever has seen the new key refuses the old
one: backups made before are of no use any more, so make a new one. Programs that
run with the identity pick the new key up; channels that are open stay open.`,
		Example:           "  sealmq identity rotate alice",
		Args:              exactArgs("a name"),
		ValidArgsFunction: a.completeIdentity,
		RunE: func(_ *cobra.Command, args []string) error {
			v, err := a.vault()
			if err != nil {
				return err
			}
			if err := v.Rotate(args[0]); err != nil {
				return vaultError(args[0], err)
			}
			p, err := v.Identity(args[0])
			if err != nil {
				return vaultError(args[0], err)
			}
			a.note("backups of %q made before now are of no use any more", args[0])
			return a.result(identityInfo{Name: args[0], Identifier: p.String()}, p.String())
		},
	}
}

func (a *app) protectCommand() *cobra.Command {
	var next keyFlags
	var plain bool
	c := &cobra.Command{
		Use:   "protect NAME",
		Short: "Encrypt an identity's keys at rest, or change or take away how",
		Example: `  sealmq identity protect alice --new-passphrase-file secret
  sealmq identity protect alice --passphrase-file secret --insecure-plain`,
		Args:              exactArgs("a name"),
		ValidArgsFunction: a.completeIdentity,
		RunE: func(_ *cobra.Command, args []string) error {
			if next == (keyFlags{}) != plain {
				return usagef("--new-passphrase-file FILE or --new-key-file FILE; --insecure-plain takes the encryption away", "say how the keys are to be protected")
			}
			p, err := next.protection()
			if err != nil {
				return err
			}
			v, err := a.vault()
			if err != nil {
				return err
			}
			if err := v.Protect(args[0], p); err != nil {
				return vaultError(args[0], err)
			}
			return a.result(map[string]any{"name": args[0], "encrypted": p.Encrypts()}, args[0]+": "+p.String())
		},
	}
	c.Flags().StringVar(&next.passphraseFile, "new-passphrase-file", "", "file with the passphrase from now on")
	c.Flags().StringVar(&next.keyFile, "new-key-file", "", "key file from now on")
	c.Flags().BoolVar(&plain, "insecure-plain", false, "keep the keys unencrypted from now on, in a file that only you can read")
	return c
}

func (a *app) exportCommand() *cobra.Command {
	var out keyFlags
	var file string
	var plain bool
	c := &cobra.Command{
		Use:   "export NAME",
		Short: "Print a backup of an identity with its keys",
		Long: `Prints everything of an identity: change history, keys, and the secret from which
its addresses derive. Whoever has the backup and its passphrase is this device. With
--out it goes to a new file that only you can read.`,
		Example: `  sealmq identity export alice --backup-passphrase-file secret --out alice.backup
  sealmq identity import alice --backup-passphrase-file secret < alice.backup`,
		Args:              exactArgs("a name"),
		ValidArgsFunction: a.completeIdentity,
		RunE: func(_ *cobra.Command, args []string) error {
			if out == (keyFlags{}) != plain {
				return usagef("--backup-passphrase-file FILE or --backup-key-file FILE; --insecure-plain makes a bare one", "say how the backup is to be protected")
			}
			p, err := out.protection()
			if err != nil {
				return err
			}
			v, err := a.vault()
			if err != nil {
				return err
			}
			backup, err := v.Export(args[0], p)
			if err != nil {
				return vaultError(args[0], err)
			}
			if file == "" {
				return a.result(map[string]string{"name": args[0], "backup": string(backup)}, string(bytes.TrimRight(backup, "\n")))
			}
			if err := identity.WriteNew(file, backup); err != nil {
				return err
			}
			return a.result(map[string]string{"name": args[0], "file": file}, file)
		},
	}
	c.Flags().StringVar(&file, "out", "", "write the backup to this file, which must not exist, whole or not at all")
	backupFlags(c.Flags(), &out)
	c.Flags().BoolVar(&plain, "insecure-plain", false, "print the keys unencrypted")
	return c
}

func backupFlags(f *pflag.FlagSet, k *keyFlags) {
	f.StringVar(&k.passphraseFile, "backup-passphrase-file", "", "file with the backup's passphrase")
	f.StringVar(&k.keyFile, "backup-key-file", "", "key file of the backup")
}

func (a *app) importCommand() *cobra.Command {
	var in keyFlags
	c := &cobra.Command{
		Use:   "import NAME",
		Short: "Read a backup from standard input and keep it under a name",
		Long: `Reads what export printed from standard input. With --passphrase-file or
--key-file the kept identity is encrypted with those. An identity that is in use
on two machines needs a suffix of its own on each.`,
		Example: "  sealmq identity import alice --backup-passphrase-file secret < alice.backup",
		Args:    exactArgs("a name"),
		RunE: func(_ *cobra.Command, args []string) error {
			p, err := in.protection()
			if err != nil {
				return err
			}
			backup, err := io.ReadAll(io.LimitReader(a.stdin, maxSecretFile))
			if err != nil {
				return coded(exitIO, fmt.Errorf("read the backup: %w", err), "")
			}
			v, err := a.vault()
			if err != nil {
				return err
			}
			id, err := v.Import(args[0], backup, p)
			switch {
			case errors.Is(err, identity.ErrSealed):
				return coded(exitNoPerm, errors.New("the backup is encrypted"), "give --backup-passphrase-file or --backup-key-file")
			case errors.Is(err, identity.ErrPassphrase):
				return coded(exitNoPerm, errors.New("the backup does not open: wrong passphrase or key file, or it was altered"), "")
			case errors.Is(err, identity.ErrFile), errors.Is(err, identity.ErrNewerFile):
				return coded(exitData, err, "it has to be what sealmq identity export printed")
			case err != nil:
				return vaultError(args[0], err)
			}
			return a.result(infoOf(args[0], id.Identity()), id.Identifier().String())
		},
	}
	backupFlags(c.Flags(), &in)
	return c
}

func (a *app) keyFileCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "key-file FILE",
		Short:   "Make a file of random digits that can protect keys at rest",
		Example: "  sealmq identity key-file /media/stick/sealmq.key",
		Args:    exactArgs("a file"),
		RunE: func(_ *cobra.Command, args []string) error {
			if err := identity.CreateKeyFile(args[0]); err != nil {
				return vaultError("", err)
			}
			return a.result(map[string]string{"key_file": args[0]}, args[0])
		},
	}
}
