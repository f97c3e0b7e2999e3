"""A host's folder: its key, credentials, pinned root and host.toml, each written whole, the last of them last."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from loopback.cli.token import Token
from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import SigningKey
from loopback.host import config
from loopback.trust import natsjwt

FILES: Final = ("host.creds", "root.json", "host.toml")


class Pending(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`enrol.json`: the invitation that this folder took, and the key's seed until it is in `host.creds`."""

    invite: str
    seed: str = ""


class Folder:
    """The folder of a host that enrols."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self._pending = out / "enrol.json"

    def key_for(self, invite: str, host: str, workspace: str, replace: bool) -> SigningKey:
        """The key with which to take this invitation: the one of an earlier try, or a new one, durable before this returns.

        Raises Refused(NAME_INVALID) where the folder is another host's, or a host's at all without `replace`.
        """
        self.out.mkdir(parents=True, exist_ok=True, mode=0o700)
        pending = self._read_pending()
        if pending is not None and pending.invite == invite:
            if pending.seed:
                return SigningKey.from_nkey(pending.seed)
            return natsjwt.read_creds((self.out / "host.creds").read_text())[1]
        there = [str(self.out / name) for name in FILES if (self.out / name).exists()]
        if there and not replace:
            raise Refused(
                Code.NAME_INVALID,
                f"{there[0]} exists",
                "choose another folder, or give the host in it a new key with --replace",
            )
        known = self._known()
        if known is not None and (known.host, known.workspace) != (host, workspace):
            raise Refused(
                Code.NAME_INVALID,
                f"{self.out} is the folder of {known.host!r} in {known.workspace!r}, not of {host!r} in {workspace!r}",
                "choose another folder",
            )
        key = SigningKey.generate()
        self._write_pending(Pending(invite=invite, seed=natsjwt.seed("user", key)))
        return key

    def complete(
        self, given: Token, key: SigningKey, jwt: str, root: bytes,
        firewall: Mapping[str, config.Setting], heartbeat_s: float,
    ) -> Path:  # fmt: skip
        """Write what makes it a host; the path of its host.toml. Settings of one that is there are kept."""
        write(self.out / "root.json", root)
        if given.ca:
            write(self.out / "ca.pem", given.ca.encode())
        write(self.out / "host.creds", natsjwt.creds(jwt, natsjwt.seed("user", key)).encode())
        known = self._known()
        ca = Path("ca.pem") if given.ca else None
        if known is not None:
            files = {"creds": Path("host.creds"), "root": Path("root.json"), "ca": ca or known.ca}
            made = msgspec.structs.replace(known, url=given.url, **files)
        else:
            made = new_config(given.host, given.workspace, given.url, firewall, heartbeat_s, ca)
        write_config(made, self.out / "host.toml")
        self._write_pending(Pending(invite=given.invite))  # the seed is in host.creds now
        return self.out / "host.toml"

    def _known(self) -> config.HostConfig | None:
        path = self.out / "host.toml"
        return config.load(path) if path.exists() else None

    def _read_pending(self) -> Pending | None:
        try:
            return msgspec.json.decode(self._pending.read_bytes(), type=Pending)
        except FileNotFoundError:
            return None
        except msgspec.MsgspecError as error:
            raise Refused(
                Code.CONFIG_INVALID, f"{self._pending} is damaged: {error}", "remove it and use a new token"
            ) from None

    def _write_pending(self, pending: Pending) -> None:
        write(self._pending, msgspec.json.encode(pending))


def new_config(
    host: str, workspace: str, url: str, firewall: Mapping[str, config.Setting], heartbeat_s: float,
    ca: Path | None = None,
) -> config.HostConfig:  # fmt: skip
    """The settings of a new host; paths are relative to its folder."""
    return config.HostConfig(
        host=host,
        workspace=workspace,
        url=url,
        creds=Path("host.creds"),
        root=Path("root.json"),
        state_dir=Path("state"),
        heartbeat_s=heartbeat_s,
        ca=ca,
        allow=config.Allow(modules=("firewall",), capabilities=config.CAPABILITIES),
        modules={"firewall": dict(firewall)} if firewall else {},
    )


def pinned_root(home: Path) -> bytes:
    """The installation's root.json. Raises Refused(TUF_UNREACHABLE)."""
    path = home / "tuf" / "root.json"
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise Refused(
            Code.TUF_UNREACHABLE, f"there is no trust root {path}", "make it with 'loopback keys init'"
        ) from None


def check(host: str, workspace: str, addresses: Sequence[str]) -> None:
    """Refuse names that a host's own configuration would refuse later. Raises Refused(NAME_INVALID)."""
    for what, name in (("host", host), ("workspace", workspace)):
        if not config.NAME.fullmatch(name):
            raise Refused(
                Code.NAME_INVALID,
                f"{what}: {name!r} must be lower-case letters, digits, dots, dashes and underscores",
                "choose a name such as web-1",
            )
    for address in addresses:
        try:
            ipaddress.ip_interface(address)
        except ValueError:
            raise Refused(
                Code.NAME_INVALID, f"--address {address!r} is no IP address", "write it like 192.0.2.7"
            ) from None


def write_config(made: config.HostConfig, path: Path) -> None:
    """Write a host.toml, whole or not at all."""
    fresh = path.with_name("host.toml.whole")
    config.write_config(made, fresh)
    write(path, fresh.read_bytes())
    fresh.unlink()


def write(path: Path, data: bytes) -> None:
    """Write a file that only its owner reads, whole and durable, or not at all."""
    fresh = path.with_name(path.name + ".new")
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
