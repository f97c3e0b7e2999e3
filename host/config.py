"""`host.toml`: who this host is, where the bus is, and what the machine's owner lets modules do.

Nothing in it can be changed from outside: the allow-list is the owner's word, above any signature.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import tomllib
from pathlib import Path
from typing import Final

import msgspec

import loopback
from loopback.contracts.codes import Code, Refused

Setting = str | int | float | bool | list[str]

CAPABILITIES: Final = ("CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON")  # what a firewall needs since Linux 5.8
HEARTBEAT_S: Final = 10.0
#: The folders that this code itself lies in: whoever can change those needs no configuration, so nothing is won by looking.
#: It lets root try a checkout of somebody else's.
CODE: Final = frozenset(Path(loopback.__file__).resolve().parents)
MAX_LINKS: Final = 40  # symbolic links on the way to one file; the kernel follows as many
MAX_CONFIG: Final = 256 * 1024  # bytes; one with every field has under 2 KiB
NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?")
_KEYID = re.compile(r"[0-9a-f]{64}")


class Allow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What may run here at all: names of modules, the Linux capabilities that any of them may ask for, and the keys
    (ids in hex) whose releases are run. No publishers means any whom the TUF repository entitles.

    `read` and `write` are absolute paths that modules may reach beyond their own (`reach`), where the kernel holds them to it.
    """

    modules: tuple[str, ...] = ()
    capabilities: tuple[str, ...] = ()
    publishers: tuple[str, ...] = ()
    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()


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

    Raises Refused(CONFIG_INVALID) naming the file and the line or field at fault, or whoever else could change it.
    """
    try:
        text = _read(path)
    except FileNotFoundError:
        raise _refused(
            path, "there is no such file", "make one with 'loopback host add HOST --out DIR'"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise _refused(path, f"it cannot be read: {error}") from None
    found = parse(text, path)
    # They decide too who is obeyed here, and as whom.
    for trusted in (found.root, found.creds, found.state_dir, *([found.ca] if found.ca else [])):
        _check_place(trusted)
    return found


def parse(text: str, path: Path) -> HostConfig:
    """The same for a file's text; `path` is where it lies. Raises Refused(CONFIG_INVALID)."""
    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
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
        f"publishers = {_toml(list(config.allow.publishers))}  # key ids; empty: any whom the repository entitles",
        *([f"read = {_toml(list(config.allow.read))}"] if config.allow.read else []),
        *([f"write = {_toml(list(config.allow.write))}"] if config.allow.write else []),
    ]
    for name, settings in config.modules.items():
        lines += ["", f"[modules.{_toml(name)}]", *(f"{_toml(k)} = {_toml(v)}" for k, v in settings.items())]
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write("\n".join(lines) + "\n")


def with_state_dir(config: HostConfig, path: Path) -> HostConfig:
    """The same with its state elsewhere. Raises Refused(CONFIG_INVALID) where others decide what lies there."""
    path = path.absolute()
    _check_place(path)
    return msgspec.structs.replace(config, state_dir=path)


def _check_place(path: Path) -> None:
    """`check_owned` of what need not be there yet."""
    try:
        check_owned(path, path.stat())
    except FileNotFoundError:
        _check_above(path)  # whoever needs it says that it is missing
    except OSError as error:
        raise _refused(path, f"it cannot be read: {error.strerror}") from None


def check_owned(path: Path, status: os.stat_result) -> None:
    """Whether nobody but root and the agent's own user can change this file or put another in its place.

    `status` is that of the open file. Raises Refused(CONFIG_INVALID) naming the file or folder, and OSError.
    """
    _check_owner(path, status, "folder" if stat.S_ISDIR(status.st_mode) else "file")
    _check_above(path)


def _check_above(path: Path) -> None:
    for place, below in _above(path):
        if place in CODE:
            continue
        try:
            around = place.lstat()
        except FileNotFoundError:
            continue  # whoever may make it may write to the folder that it would lie in
        if stat.S_ISLNK(around.st_mode):
            if around.st_uid not in _owners():  # its mode says nothing
                _check_owner(place, around, "link")
        elif not (around.st_mode & stat.S_ISVTX and around.st_uid in _owners() and os.path.lexists(below)):
            _check_owner(place, around, "folder")
        # As in /tmp: others may add, but not replace what is there and is root's or ours, and that is looked at as well.


def _above(path: Path) -> list[tuple[Path, Path]]:
    """Every folder and link that decides which file this name is, up to the root; of each, what is taken from it.

    Whoever can write to any of them can put another tree in its place; sshd's StrictModes and sudo look up as well.
    Raises OSError.
    """
    found: dict[tuple[Path, Path], None] = {}
    waiting = [path.absolute()]
    for _ in range(MAX_LINKS):
        if not waiting:
            return list(found)
        lexical = waiting.pop()
        parts = lexical.parts
        place = Path(parts[0])
        for number, part in enumerate(parts[1:], 1):
            if part == "..":
                place = place.parent
                continue
            found[place, place / part] = None
            place /= part
            if place.is_symlink():
                found[place, place] = None
                waiting.append(place.parent.joinpath(place.readlink(), *parts[number + 1 :]))
                break
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def _check_owner(path: Path, status: os.stat_result, what: str) -> None:
    if status.st_uid not in _owners():
        raise _refused(
            path,
            f"the {what} belongs to user {status.st_uid}, so that user decides what may run here",
            f"make it root's: chown root {path}",
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        whom = "everybody" if status.st_mode & stat.S_IWOTH else f"group {status.st_gid}"
        raise _refused(
            path,
            f"the {what} can be changed by {whom}, which would decide what may run here",
            f"chmod go-w {path}",
        )


def _owners() -> tuple[int, ...]:
    return (0, os.geteuid())


def _read(path: Path) -> str:
    """The text of a file that only its owner can change. What was checked is what is read, whatever happens to the name."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _refused(path, "it is no plain file")
        check_owned(path, status)
        data = os.read(descriptor, MAX_CONFIG + 1)
    finally:
        os.close(descriptor)
    if len(data) > MAX_CONFIG:
        raise _refused(path, f"it has more than {MAX_CONFIG} bytes")
    return data.decode()


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
    for publisher in config.allow.publishers:
        if not _KEYID.fullmatch(publisher):
            raise _refused(
                path,
                f"allow.publishers: {publisher[:80]!r} is no key id of 64 hex digits",
                "copy it from 'loopback module verify FILE' or 'loopback keys show'",
            )
    for beyond in (*config.allow.read, *config.allow.write):
        if not beyond.startswith("/"):
            raise _refused(path, f"allow: {beyond[:200]!r} is no absolute path")
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
