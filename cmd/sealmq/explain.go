package main

import (
	"errors"
	"io/fs"
	"net"
	"syscall"

	"github.com/sealmq/sealmq/bridge"
	"github.com/sealmq/sealmq/bridge/store"
	"github.com/sealmq/sealmq/broker"
	"github.com/sealmq/sealmq/channel"
	"github.com/sealmq/sealmq/device"
	"github.com/sealmq/sealmq/identity"
	"github.com/sealmq/sealmq/internal/pinfile"
)

// explanations give the errors of the library their exit code and say what to
// do. The first that fits counts: the more particular errors come first.
var explanations = []struct {
	is   error
	code int
	hint string
}{
	{device.ErrURL, exitUsage, "for example --hub mqtt://127.0.0.1:1883"},
	{device.ErrClearPassword, exitConfig, "--insecure-password-without-tls sends it all the same"},
	{device.ErrClock, exitNoPerm, "set this machine's clock, for example with NTP"},
	{device.ErrCertificate, exitNoPerm, "--ca-file names the authority of the hub's certificate; the host in --hub must be one that it is for"},
	{device.ErrBadProof, exitNoPerm, "if the key was rotated on another machine, import its backup; the hub's log has the reason"},
	{device.ErrBadCredentials, exitNoPerm, "check --user and --password-file (or SEALMQ_USER and SEALMQ_PASSWORD)"},
	{device.ErrWrongHub, exitNoPerm, "somebody may be in the way; if the hub was set up anew, change the pin"},
	{device.ErrInboxRefused, exitNoPerm, "--root must be the hub's; if it is, ask its operator for an account that fits this identity: sealmq identity show"},
	{device.ErrAliasRefused, exitNoPerm, "choose another --alias, or give the --identity that it belongs to"},
	{device.ErrHubBusy, exitUnavailable, "try again in a moment; if it stays so, its limits are reached, and its log says which"},
	{device.ErrNotAllowed, exitNoPerm, "sealmq hub lets an identity in with --allow-device, a credential (--device-authority) or an account (sealmq passwd)"},
	{device.ErrHubRefused, exitNoPerm, "the hub's log says more"},
	{device.ErrTakenOver, exitNoPerm, "run one `sealmq listen` for each identity, or give each its own --identity"},
	{device.ErrUnknownAddress, exitNoUser, "compare it with what sealmq listen prints at the peer, and check that both use the same hub"},
	{device.ErrPeerOffline, exitTempFail, "is its program running? sealmq listen, or what you use instead, has to be connected to this hub"},
	{device.ErrExpired, exitTempFail, "is its program running, and not stopped or too busy to read?"},
	{device.ErrPeerRefused, exitNoPerm, "the peer's --trust must name this identity: sealmq identity show"},
	{device.ErrUnknownPeer, exitNoPerm, "--trust first-use remembers who is there now; --trust IDENTIFIER is better"},
	{device.ErrBadClaim, exitNoPerm, "the hub, or somebody in between, shows what the peer has not signed; reach the peer another way"},
	{device.ErrWrongIdentity, exitNoPerm, "check the identifier in --trust with the peer; if it is right, somebody else answered"},
	{channel.ErrWrongIdentity, exitNoPerm, "check the identifier in --trust with the peer; if it is right, somebody else answered"},
	{device.ErrNoWorker, exitNoUser, "check --address; sealmq listen takes messages at \"app\" and \"echoer\""},
	{device.ErrNoDelivery, exitProtocol, "--wait 0 sends without waiting for the peer"},
	{device.ErrOutboxInUse, exitTempFail, ""},
	{device.ErrOutboxIdentity, exitConfig, ""},
	{device.ErrOutboxDamaged, exitData, ""},
	{device.ErrOutboxBehind, exitData, ""},
	{device.ErrOutboxOpen, exitNoPerm, ""},
	{device.ErrFrameKills, exitUnavailable, "something between here and the hub does not let this message through"},
	{device.ErrUnacknowledged, exitTempFail, "the peer's program may have taken it or not; allow more time with --wait and --timeout"},
	{device.ErrRoute, exitUsage, ""},
	{device.ErrTooLarge, exitData, "the hub's operator can raise limits.frame"},
	{device.ErrPeerClosed, exitTempFail, "the peer ended the channel; try again"},
	{device.ErrNotHub, exitProtocol, "check the scheme and the port in --hub"},
	{device.ErrNoAnswer, exitUnavailable, "check the scheme and the port in --hub, and on the hub's machine that it runs and what its log says"},
	{device.ErrHubAway, exitUnavailable, "is the hub running there? sealmq hub starts one; --hub says where to look"},
	{broker.ErrBadLogin, exitNoPerm, ""},
	{identity.ErrSealed, exitNoPerm, "give --passphrase-file or --key-file, or set " + envPassphrase},
	{identity.ErrPassphrase, exitNoPerm, ""},
	{identity.ErrNoPassphrase, exitData, ""},
	{identity.ErrFile, exitData, ""},
	{identity.ErrNotRegular, exitData, ""},
	{identity.ErrNewerFile, exitConfig, ""},
	{device.ErrBusy, exitTempFail, "try again in a moment"},
	{device.ErrTimeout, exitTempFail, "try again, or allow more time with --timeout"},
	{channel.ErrHandshake, exitProtocol, "what answered there is not an Ockam secure channel listener"},
}

// storeCode is the exit code of a hub that cannot use its store.
func storeCode(err error) int {
	switch {
	case errors.Is(err, store.ErrInUse):
		return exitOS
	case errors.Is(err, bridge.ErrRoute), errors.Is(err, store.ErrNewer), errors.Is(err, store.ErrIdentity), errors.Is(err, store.ErrKey):
		return exitConfig
	case errors.Is(err, store.ErrCorrupt):
		return exitData
	case errors.Is(err, fs.ErrPermission):
		return exitNoPerm
	case errors.Is(err, syscall.EROFS):
		return exitCantCreate
	}
	return exitIO
}

// knownCode is the exit code of a file of known hubs or peers that cannot be used, and
// what to do.
func knownCode(e *device.KnownFileError) (code int, hint string) {
	without := "--trust IDENTIFIER needs no file"
	flag := "--known-peers"
	if e.What == "known hubs" {
		without, flag = "--known-hubs none does without", "--known-hubs"
	}
	switch {
	case errors.Is(e, pinfile.ErrName):
		return exitUsage, without
	case e.Op == "read":
		return exitIO, "let this user read it, or name another with " + flag
	case errors.Is(e, syscall.ENOSPC), errors.Is(e, syscall.EDQUOT), errors.Is(e, syscall.EFBIG), errors.Is(e, syscall.EIO):
		return exitIO, fileHint(e)
	}
	return exitCantCreate, "let this user write to it and to its folder, or name another with " + flag + "; " + without
}

// explain returns the exit code and the hint of an error of the library, 0 and
// "" for any other.
func explain(err error) (code int, hint string) {
	var config *broker.ConfigError
	var password *broker.PasswordError
	var permission *broker.PermissionError
	var keys *identity.PermissionError
	var listen *broker.ListenError
	var stored *broker.StoreError
	var syntax *pinfile.SyntaxError
	var writable *pinfile.PermissionError
	var dns *net.DNSError
	var changed *device.PeerChangedError
	var known *device.KnownFileError
	switch {
	case errors.As(err, &config), errors.As(err, &password), errors.As(err, &syntax):
		return exitConfig, ""
	case errors.As(err, &permission), errors.As(err, &keys), errors.As(err, &writable):
		return exitNoPerm, ""
	case errors.As(err, &listen):
		return exitOS, ""
	case errors.As(err, &stored):
		return storeCode(stored), ""
	case errors.As(err, &changed):
		return exitNoPerm, "ask the peer another way what sealmq identity show prints there; only if that is the new one, remove the line"
	case errors.As(err, &known):
		return knownCode(known)
	case errors.As(err, &dns) && dns.IsNotFound:
		return exitNoHost, "check the host name in --hub"
	}
	for _, e := range explanations {
		if errors.Is(err, e.is) {
			return e.code, e.hint
		}
	}
	return 0, ""
}
