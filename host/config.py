"""`host.toml`: who this host is, where the bus is, and what the machine's owner lets modules do.

Nothing in it can be changed from outside: the allow-list is the owner's word, above any signature.
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Final

import msgspec

from loopback.contracts.codes import Code, Refused

Setting = str | int | float | bool | list[str]

CAPABILITIES: Final = ("CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON")  # what a firewall needs since Linux 5.8
HEARTBEAT_S: Final = 10.0
NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?")


class Allow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What may run here at all: names of modules, and the Linux capabilities that any of them may ask for."""

    modules: tuple[str, ...] = ()
    capabilities: tuple[str, ...] = ()


class HostConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One host's configuration; paths are absolute once loaded. Durations are seconds.

    `root` is the pinned TUF root that came with the host's credentials, `state_dir` where everything is kept.
    `modules` holds each module's own settings, handed to it as they are. `otel` sends spans and metrics over the bus.
    """

    host: str
    workspace: str
    url: str
    creds: Path
    root: Path
    state_dir: Path
    heartbeat_s: float = HEARTBEAT_S
    otel: bool = True
    ca: Path | None = None
    allow: Allow = Allow()
    modules: dict[str, dict[str, Setting]] = {}


def load(path: Path) -> HostConfig:
    """Read a `host.toml`; relative paths in it are relative to it.

    Raises Refused(CONFIG_INVALID) naming the file and the line or field at fault.
    """
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise _refused(
            path, "there is no such file", "make one with 'loopback host add HOST --out DIR'"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise _refused(path, f"it cannot be read: {error}") from None
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _refused(path, str(error)) from None
    try:
        config = msgspec.convert(table, HostConfig, dec_hook=_path)
    except msgspec.ValidationError as error:
        raise _refused(path, _field(error)) from None
    return _checked(config, path)


def write_config(config: HostConfig, path: Path) -> None:
    """Write it as TOML, readable by its owner only. Paths are written as they are."""
    lines = [
        "# Loopback Modules: one host. Nothing in this file can be changed from outside.",
        f"host = {_toml(config.host)}",
        f"workspace = {_toml(config.workspace)}",
        f"url = {_toml(config.url)}",
        f"creds = {_toml(str(config.creds))}",
        f"root = {_toml(str(config.root))}",
        f"state_dir = {_toml(str(config.state_dir))}",
        f"heartbeat_s = {_toml(config.heartbeat_s)}",
        f"otel = {_toml(config.otel)}",
        *([f"ca = {_toml(str(config.ca))}"] if config.ca else []),
        "",
        "[allow]  # modules not named here never run; capabilities not named here are never given",
        f"modules = {_toml(list(config.allow.modules))}",
        f"capabilities = {_toml(list(config.allow.capabilities))}",
    ]
    for name, settings in config.modules.items():
        lines += ["", f"[modules.{_toml(name)}]", *(f"{_toml(k)} = {_toml(v)}" for k, v in settings.items())]
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write("\n".join(lines) + "\n")


def _checked(config: HostConfig, path: Path) -> HostConfig:
    for field in ("host", "workspace"):
        if not NAME.fullmatch(getattr(config, field)):
            raise _refused(path, f"{field} must match {NAME.pattern}, not {getattr(config, field)!r}")
    if not re.fullmatch(r"(nats|tls|ws|wss)://[^\s]+", config.url):
        raise _refused(path, f"url must be nats://HOST:PORT or tls://HOST:PORT, not {config.url!r}")
    if not 0.1 <= config.heartbeat_s <= 3600:
        raise _refused(path, f"heartbeat_s must lie between 0.1 and 3600 seconds, not {config.heartbeat_s}")
    for capability in config.allow.capabilities:
        if not re.fullmatch(r"CAP_[A-Z_]+", capability):
            raise _refused(path, f"allow.capabilities: {capability!r} is no capability; write it as CAP_BPF")
    base = path.absolute().parent
    return msgspec.structs.replace(
        config,
        creds=base / config.creds,
        root=base / config.root,
        state_dir=base / config.state_dir,
        ca=base / config.ca if config.ca else None,
    )


def _path(kind: type, value: object) -> object:
    if kind is Path and isinstance(value, str) and value:
        return Path(value)
    raise ValueError("Expected a path")


def _field(error: msgspec.ValidationError) -> str:
    """msgspec's words, with the path of the field in front: `allow.modules[0]: Expected …`."""
    words, _, where = str(error).partition(" - at `$.")
    return f"{where.rstrip('`')}: {words}" if where else words


def _refused(path: Path, reason: str, next_step: str = "correct the file and start again") -> Refused:
    return Refused(Code.CONFIG_INVALID, f"{path}: {reason}", next_step)


def _toml(value: Setting) -> str:
    """A TOML value. JSON's strings, numbers and lists of strings are TOML's too, except for DEL and lone surrogates."""
    return msgspec.json.encode(value).decode().replace("\x7f", "\\u007f")
