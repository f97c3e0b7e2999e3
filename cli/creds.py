"""Identities on the bus: NATS operator, account and user JWTs, and what each identity may do there.

An identity may publish and read what its part of the flow needs and no more. Services create consumers, so they can read any
stream named here; what they may *write* is what protects the others. Hosts can create nothing at all. Only eligibility makes
streams. The broker does not check reply subjects, so nobody trusts a message for where it came from: commands, desired
states and reports are signed.

JWTs are version 2 with `alg: ed25519-nkey`, as the server's own tools make them.
"""

from __future__ import annotations

import base64
import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import nkeys

from loopback.contracts import subjects
from loopback.contracts.codes import Code, Refused
from loopback.services._runtime.settings import read_identity

ACCOUNT: Final = "LOOPBACK"
ADMIN: Final = "admin"
OPERATOR: Final = "operator"
USERS: Final = (ADMIN, OPERATOR, *subjects.SERVICES)

_UNLIMITED: Final = {"subs": -1, "data": -1, "payload": -1}
_PREFIX: Final = {
    "operator": nkeys.PREFIX_BYTE_OPERATOR,
    "account": nkeys.PREFIX_BYTE_ACCOUNT,
    "user": nkeys.PREFIX_BYTE_USER,
}


class Permissions(msgspec.Struct, frozen=True):
    """Subjects that an identity may publish to and subscribe to; denials win."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]
    deny_publish: tuple[str, ...] = ()

    def claims(self) -> dict[str, Any]:
        """As a JWT carries them."""
        publish: dict[str, Any] = {"allow": list(self.publish)}
        if self.deny_publish:
            publish["deny"] = list(self.deny_publish)
        return {"pub": publish, "sub": {"allow": list(self.subscribe)}}


def _reads(*streams: str) -> tuple[str, ...]:
    """The API subjects for following these streams and for reading single messages of them."""
    return tuple(
        subject
        for stream in streams
        for subject in (
            f"$JS.API.STREAM.INFO.{stream}",
            f"$JS.API.STREAM.MSG.GET.{stream}",
            f"$JS.API.DIRECT.GET.{stream}",
            f"$JS.API.DIRECT.GET.{stream}.>",
            f"$JS.API.CONSUMER.CREATE.{stream}.>",
            f"$JS.API.CONSUMER.INFO.{stream}.>",
            f"$JS.API.CONSUMER.MSG.NEXT.{stream}.>",
        )
    )


def _shares(stream: str) -> tuple[str, ...]:
    """Acknowledging work on this stream."""
    return (f"$JS.ACK.{stream}.>",)


def _commands(service: str) -> tuple[str, ...]:
    """A service's own commands: its one durable consumer, and no other's."""
    stream, durable = subjects.STREAM_COMMANDS, f"{service}-commands"
    return (
        f"$JS.API.CONSUMER.CREATE.{stream}.{durable}",
        f"$JS.API.CONSUMER.CREATE.{stream}.{durable}.>",
        f"$JS.API.CONSUMER.INFO.{stream}.{durable}",
        f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{durable}",
        f"$JS.ACK.{stream}.{durable}.>",
        f"$JS.API.STREAM.INFO.{stream}",
        "lb.ws.*.result.*",
    )


def _others(service: str, *streams: str) -> tuple[str, ...]:
    """What `*` in the place of a workspace's stream would let in: other services' commands, and these streams."""
    kinds = ("$JS.API.CONSUMER.CREATE", "$JS.API.CONSUMER.INFO", "$JS.API.CONSUMER.MSG.NEXT")
    denied: list[str] = []
    for other in (*subjects.SERVICES, OPERATOR):
        if other != service:
            denied += [f"{kind}.{subjects.STREAM_COMMANDS}.{other}-commands" for kind in kinds]
            denied += [f"{kind}.{subjects.STREAM_COMMANDS}.{other}-commands.>" for kind in kinds]
            denied += [f"$JS.ACK.{subjects.STREAM_COMMANDS}.{other}-commands.>"]
    for stream in streams:
        denied += [f"{kind}.{stream}.>" for kind in kinds]
        denied += [f"$JS.ACK.{stream}.>"]
    return tuple(denied)


def _service(name: str, *publish: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What every service may do: read trust and content, keep its journal, and answer NATS's own service questions."""
    return (
        (
            *_reads(subjects.STREAM_TUF, subjects.STREAM_BLOBS),
            f"$JS.API.STREAM.INFO.{subjects.STREAM_COMMANDS}",
            "$JS.API.INFO",
            "$JS.API.STREAM.NAMES",
            f"lb.ws.*.journal.{name}.>",
            f"_INBOX.{OPERATOR}.>",
            f"_INBOX.{ADMIN}.>",
            *publish,
        ),
        (f"_INBOX.{name}.>", "$SRV.*", f"$SRV.*.{name}", f"$SRV.*.{name}.*"),
    )


_VIEW_STREAM: Final = f"KV_{subjects.BUCKET_VIEW}"
_ANY: Final = "*"  # workspaces' streams share no prefix that a subject's wildcard could name


def permissions() -> dict[str, Permissions]:
    """Every identity but the hosts'."""
    return {
        ADMIN: Permissions((">",), (">",)),
        OPERATOR: Permissions(
            (
                "lb.ws.*.cmd.>",
                "lb.blob.>",
                *_reads(_ANY),
                "$JS.API.INFO",
                "$JS.API.STREAM.NAMES",
                "$JS.API.STREAM.LIST",
                "$JS.FC.>",
                "$SRV.>",
            ),
            (f"_INBOX.{OPERATOR}.>", "lb.ws.>", "lb.catalog.>"),
            # An operator reads; only services share work, so nobody else may touch their consumers there.
            _others(OPERATOR),
        ),
        "eligibility": Permissions(
            *_service(
                "eligibility",
                *_commands("eligibility"),
                *_reads(_ANY),
                *_shares(_ANY),
                "$JS.API.STREAM.CREATE.*",
                "lb.ws.*.record.>",
                "lb.ws.*.offer.*",
                "lb.ws.*.verdict.*.eligibility",
            ),
            _others("eligibility", subjects.STREAM_OTLP, _VIEW_STREAM),
        ),
        "delivery": Permissions(
            *_service(
                "delivery",
                *_commands("delivery"),
                *_reads(_ANY),
                *_shares(_ANY),
                "lb.catalog.>",
                "lb.tuf.>",
                "lb.blob.>",  # the first trust document, which comes with the first repository
                "lb.ws.*.verdict.*.delivery",
            ),
            _others("delivery", subjects.STREAM_OTLP, subjects.STREAM_REPORTS, _VIEW_STREAM),
        ),
        "activation": Permissions(
            *_service(
                "activation",
                *_commands("activation"),
                *_reads(_ANY),
                *_shares(_ANY),
                "lb.ws.*.rollout.>",
                "lb.ws.*.desired.*",
            ),
            _others("activation", subjects.STREAM_OTLP, _VIEW_STREAM),
        ),
        "telemetry": Permissions(
            *_service(
                "telemetry",
                *_reads(subjects.STREAM_REPORTS, subjects.STREAM_OTLP, subjects.STREAM_FLEET, _VIEW_STREAM),
                *_shares(subjects.STREAM_REPORTS),
                *_shares(subjects.STREAM_OTLP),
                *_shares(subjects.STREAM_FLEET),
                "$JS.FC.>",
                f"$KV.{subjects.BUCKET_VIEW}.>",
                "lb.ws.*.presence.*",
            )
        ),
    }


#: The template for every host, filled in by the server from the host's JWT: its name and its tag `ws:<workspace>`.
HOST: Final = Permissions(
    (
        "lb.ws.{{tag(ws)}}.from.{{name()}}.>",
        "$JS.API.DIRECT.GET.*.lb.ws.{{tag(ws)}}.desired.{{name()}}",
        f"$JS.API.DIRECT.GET.{subjects.STREAM_BLOBS}.lb.blob.>",
        f"$JS.API.DIRECT.GET.{subjects.STREAM_TUF}.lb.tuf.>",
    ),
    ("lb.ws.{{tag(ws)}}.to.{{name()}}.>", "_INBOX.{{name()}}.>"),
)


def init_home(home: Path, *, listen: str = "127.0.0.1:4222") -> None:
    """Make what the bus needs below `home`: keys/nats, creds and nats/. Keys that exist are kept; the rest is written anew.

    Every role has a signing key whose scope, in the account's JWT, holds the role's permissions. So a user's own JWT stays
    small (the server takes 4 KiB in one line), and a change of permissions needs no new credentials.
    """
    operator = _keep_key(home, "operator", "operator")
    account = _keep_key(home, "account", "account")
    system = _keep_key(home, "system", "account")
    place = home / "nats"
    (place / "jwt").mkdir(parents=True, exist_ok=True)
    (place / "jetstream").mkdir(exist_ok=True)
    _write(
        place / "operator.jwt",
        _jwt(
            "loopback", _public(operator), operator, {"type": "operator", "system_account": _public(system)}
        ),
    )
    roles = {"host": HOST, **permissions()}
    scopes = [
        {
            "kind": "user_scope",
            "key": _public(_keep_key(home, f"role-{role}", "account")),
            "role": role,
            "template": {**allowed.claims(), **_UNLIMITED},
        }
        for role, allowed in roles.items()
    ]
    for name, key, signing in ((ACCOUNT, account, scopes), ("SYS", system, [])):
        claims: dict[str, Any] = {"type": "account", "limits": _account_limits(jetstream=name != "SYS")}
        if signing:
            claims["signing_keys"] = signing
        _write(place / "jwt" / f"{_public(key)}.jwt", _jwt(name, _public(key), operator, claims))
    for name in USERS:
        path = home / "creds" / f"{name}.creds"
        seed = read_identity(path).seed if path.exists() else _new_seed("user")
        _write(path, _user(home, name, name, seed, ()))
    _write(place / "nats.conf", _configuration(place, listen, _public(system)))


def host_creds(home: Path, workspace: str, host: str) -> str:
    """New credentials for a host: the text of its `.creds` file, with a new key, which is also its signing key.

    Nothing is kept here, and the server needs no word of it. Raises Refused(NAME_INVALID) for a name that cannot be one,
    and where `home` holds no installation.
    """
    tags = (f"ws:{subjects.token(workspace)}",)
    return _user(home, "host", subjects.token(host), _new_seed("user"), tags)


def _user(home: Path, role: str, name: str, seed: str, tags: tuple[str, ...]) -> str:
    """A user's credentials, signed with its role's key."""
    claims: dict[str, Any] = {"type": "user", "issuer_account": _public(_read_key(home, "account"))}
    if tags:
        claims["tags"] = list(tags)
    user = nkeys.from_seed(seed.encode())
    return _creds(_jwt(name, _public(user), _read_key(home, f"role-{role}"), claims), seed)


def _key_file(home: Path, name: str) -> Path:
    return home / "keys" / "nats" / f"{name}.nk"


def _new_seed(kind: str) -> str:
    return bytes(nkeys.encode_seed(os.urandom(32), _PREFIX[kind])).decode()


def _keep_key(home: Path, name: str, kind: str) -> Any:
    path = _key_file(home, name)
    if not path.exists():
        _write(path, _new_seed(kind) + "\n")
    return _read_key(home, name)


def _read_key(home: Path, name: str) -> Any:
    path = _key_file(home, name)
    try:
        return nkeys.from_seed(path.read_bytes().strip())
    except FileNotFoundError:
        raise Refused(
            Code.SIGNATURE_INVALID, f"there is no key {path}", "run 'loopback up' first, or name its --home"
        ) from None


def _public(key: Any) -> str:
    return bytes(key.public_key).decode()


def _account_limits(*, jetstream: bool) -> dict[str, Any]:
    unlimited = ("imports", "exports", "conn", "leaf")
    limits: dict[str, Any] = {**_UNLIMITED, **dict.fromkeys(unlimited, -1), "wildcards": True}
    if jetstream:
        limits |= dict.fromkeys(("mem_storage", "disk_storage", "streams", "consumer", "max_ack_pending"), -1)
    return limits


def _jwt(name: str, subject: str, issuer: Any, claims: Mapping[str, Any]) -> str:
    body: dict[str, Any] = {
        "iat": int(time.time()),
        "iss": _public(issuer),
        "name": name,
        "sub": subject,
        "nats": {"version": 2, **claims},
    }
    body["jti"] = _base32(hashlib.sha256(msgspec.json.encode(body)).digest())
    signed = ".".join(_base64(part) for part in ({"typ": "JWT", "alg": "ed25519-nkey"}, body))
    return f"{signed}.{_base64(bytes(issuer.sign(signed.encode())))}"


def _base64(part: Mapping[str, Any] | bytes) -> str:
    data = part if isinstance(part, bytes) else msgspec.json.encode(part)
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _base32(data: bytes) -> str:
    return base64.b32encode(data).rstrip(b"=").decode()


def _creds(token: str, seed: str) -> str:
    return (
        f"-----BEGIN NATS USER JWT-----\n{token}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
    )


def _configuration(place: Path, listen: str, system: str) -> str:
    quoted = {name: msgspec.json.encode(str(place / name)).decode() for name in ("jetstream", "jwt")}
    operator = msgspec.json.encode(str(place / "operator.jwt")).decode()
    lines: Sequence[str] = (
        "# Written by 'loopback up'; changes here are overwritten.",
        f"listen: {listen}",
        "server_name: loopback",
        "max_payload: 1MB",
        "# Every acknowledged message is on the disk: with the default, a power cut loses the last two minutes.",
        f"jetstream {{ store_dir: {quoted['jetstream']}, sync_interval: always }}",
        f"operator: {operator}",
        f"system_account: {system}",
        f'resolver {{ type: full, dir: {quoted["jwt"]}, allow_delete: false, interval: "2m" }}',
    )
    return "\n".join(lines) + "\n"


def _write(path: Path, text: str) -> None:
    """Write a file that only its owner reads, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".new")
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    fresh.replace(path)
