"""Identities on the bus: NATS operator, account and user JWTs, and what each identity may do there.

An identity may publish and read what its part of the flow needs and no more. Services create consumers, so they can read any
stream named here; what they may *write* is what protects the others. Hosts can create nothing at all. Only eligibility makes
streams. The broker does not check reply subjects, so nobody trusts a message for where it came from: commands, desired
states and reports are signed.

Who vouches for whom: the operator's key signs the account, whose JWT holds one signing key for each role, with the role's
permissions; a role's key signs its users. `keys/nats` has all of these keys and is needed only here. Eligibility gets the two
that it issues with in a file of its own, `creds/eligibility.issuer` (ADR 0014).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import msgspec

from loopback.contracts import subjects
from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import SigningKey
from loopback.services._runtime.settings import Issuer, read_identity
from loopback.trust import natsjwt
from loopback.trust.repository import write_durably

ACCOUNT: Final = "LOOPBACK"
ADMIN: Final = "admin"
OPERATOR: Final = "operator"
USERS: Final = (ADMIN, OPERATOR, *subjects.SERVICES)

_QUESTIONS: Final = ("PING", "INFO", "STATS")  # NATS's own, to any service
#: How long a host's credentials count. A host asks for new ones from half of it on, so it may be away for two weeks; and
#: a key that was thrown away is worth nothing after a month, whoever finds it.
HOST_VALID: Final = timedelta(days=30)
#: A revocation for good: NATS compares it with the time at which a JWT was issued, so that no later one counts either.
FOR_GOOD: Final = datetime(9999, 12, 31, tzinfo=UTC)


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


def _shares(service: str) -> tuple[str, ...]:
    """Acknowledging the work that its replicas share."""
    return tuple(f"$JS.ACK.*.{durable}.>" for durable in subjects.DURABLES[service])


def _others(service: str, *streams: str) -> tuple[str, ...]:
    """What `*` in the place of a workspace's stream would let in: the consumers of other services' work, and these streams."""
    kinds = ("$JS.API.CONSUMER.CREATE", "$JS.API.CONSUMER.INFO", "$JS.API.CONSUMER.MSG.NEXT")
    denied: list[str] = []
    for other, durables in subjects.DURABLES.items():
        if other != service:
            for durable in durables:
                denied += [f"{kind}.*.{durable}" for kind in kinds]
                denied += [f"$JS.API.CONSUMER.CREATE.*.{durable}.>", f"$JS.ACK.*.{durable}.>"]
    denied += [subject for stream in streams for subject in _reads(stream)]
    return tuple(denied)


def _service(
    name: str, *publish: str, subscribe: tuple[str, ...] = ()
) -> tuple[tuple[str, ...], tuple[str, ...]]:
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
        (
            f"_INBOX.{name}.>",
            # Word by word: the server takes a subscription to `$SRV.>` for one that `$SRV.*` allows.
            *(f"$SRV.{word}{of}" for word in _QUESTIONS for of in ("", f".{name}", f".{name}.*")),
            *subscribe,
        ),
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
                "$SRV.>",
            ),
            (f"_INBOX.{OPERATOR}.>", "lb.ws.>", "lb.catalog.>"),
            # An operator reads; only services share work, so nobody else may touch their consumers there.
            _others(OPERATOR),
        ),
        "eligibility": Permissions(
            *_service(
                "eligibility",
                "lb.ws.*.result.*",
                *_reads(_ANY),
                *_shares("eligibility"),
                "$JS.API.STREAM.CREATE.*",
                "lb.ws.*.record.>",
                "lb.ws.*.offer.*",
                "lb.ws.*.verdict.*.eligibility",
                "lb.ws.*.to.*.identity",
                "_INBOX.enrol.*.>",
                subscribe=("lb.enrol.*", "lb.ws.*.from.*.renew"),
            ),
            _others("eligibility", subjects.STREAM_OTLP, _VIEW_STREAM),
        ),
        "delivery": Permissions(
            *_service(
                "delivery",
                "lb.ws.*.result.*",
                *_reads(_ANY),
                *_shares("delivery"),
                "lb.catalog.>",
                "lb.tuf.>",
                "lb.blob.>",  # the first trust document, which comes with the first repository
                f"$JS.API.STREAM.PURGE.{subjects.STREAM_BLOBS}",  # content that nobody names
                "lb.ws.*.verdict.*.delivery",
            ),
            _others("delivery", subjects.STREAM_OTLP, subjects.STREAM_REPORTS, _VIEW_STREAM),
        ),
        "activation": Permissions(
            *_service(
                "activation",
                "lb.ws.*.result.*",
                *_reads(_ANY),
                *_shares("activation"),
                "lb.ws.*.rollout.>",
                "lb.ws.*.desired.*",
                "lb.ws.*.roster.*",
                "lb.ws.*.slice.*.*",
            ),
            _others("activation", subjects.STREAM_OTLP, _VIEW_STREAM),
        ),
        "telemetry": Permissions(
            *_service(
                "telemetry",
                *_reads(subjects.STREAM_REPORTS, subjects.STREAM_OTLP, subjects.STREAM_FLEET, _VIEW_STREAM),
                *_shares("telemetry"),
                f"$KV.{subjects.BUCKET_VIEW}.>",
                "lb.ws.*.presence.*",
            ),
            _others("telemetry"),
        ),
    }


#: The template for every host, filled in by the server from the host's JWT: its name and its tag `ws:<workspace>`.
HOST: Final = Permissions(
    (
        "lb.ws.{{tag(ws)}}.from.{{name()}}.>",
        "$JS.API.DIRECT.GET.*.lb.ws.{{tag(ws)}}.desired.{{name()}}",
        f"$JS.API.DIRECT.GET.{subjects.STREAM_ROSTERS}.lb.ws.{{{{tag(ws)}}}}.roster.*",
        f"$JS.API.DIRECT.GET.{subjects.STREAM_ROSTERS}.lb.ws.{{{{tag(ws)}}}}.slice.*.*",
        f"$JS.API.DIRECT.GET.{subjects.STREAM_BLOBS}.lb.blob.>",
        f"$JS.API.DIRECT.GET.{subjects.STREAM_TUF}.lb.tuf.>",
    ),
    ("lb.ws.{{tag(ws)}}.to.{{name()}}.>", "lb.ws.{{tag(ws)}}.rosters.*", "_INBOX.{{name()}}.>"),
)


#: The template for whoever holds an invitation's token; its JWT's name is the token's key id. One subject, one inbox.
ENROL: Final = Permissions(("lb.enrol.{{name()}}",), ("_INBOX.enrol.{{name()}}.>",))


def init_home(home: Path, *, listen: str = "127.0.0.1:4222") -> None:
    """Make what the bus needs below `home`: keys/nats, creds and nats/. Keys that exist are kept; the rest is written anew.

    Every role has a signing key whose scope, in the account's JWT, holds the role's permissions. So a user's own JWT stays
    small (the server takes 4 KiB in one line), and a change of permissions needs no new credentials. What was revoked
    stays revoked.
    """
    operator = _keep_key(home, "operator", "operator")
    _keep_key(home, "account", "account")
    system = _keep_key(home, "system", "account")
    for role in _roles():
        _keep_key(home, f"role-{role}", "account")
    place = home / "nats"
    (place / "jwt").mkdir(parents=True, exist_ok=True)
    (place / "jetstream").mkdir(exist_ok=True)
    now, system_key = datetime.now(UTC), natsjwt.public("account", system.public)
    public = natsjwt.public("operator", operator.public)
    described = {"type": "operator", "system_account": system_key}
    _write(place / "operator.jwt", natsjwt.encode("loopback", public, "operator", operator, described, now))
    write_account(home)
    plain = {"type": "account", "limits": _account_limits(jetstream=False)}
    token = natsjwt.encode("SYS", system_key, "operator", operator, plain, now)
    _write(place / "jwt" / f"{system_key}.jwt", token)
    for name in USERS:
        path = home / "creds" / f"{name}.creds"
        key = SigningKey.from_nkey(read_identity(path).seed) if path.exists() else SigningKey.generate()
        _write(path, _user(home, name, name, key, (), None))
    _write_issuer(home)
    _write(place / "nats.conf", _configuration(place, listen, system_key))


def _roles() -> dict[str, Permissions]:
    return {"host": HOST, "enrol": ENROL, **permissions()}


def account_jwt(home: Path) -> str:
    """The account's JWT as it should be now: every role with its permissions, and every revocation.

    Raises Refused where `home` does not hold the installation's keys.
    """
    account = natsjwt.public("account", read_key(home, "account").public)
    scopes = [
        {
            "kind": "user_scope",
            "key": natsjwt.public("account", read_key(home, f"role-{role}").public),
            "role": role,
            "template": {**allowed.claims(), **natsjwt.UNLIMITED},
        }
        for role, allowed in _roles().items()
    ]
    claims: dict[str, Any] = {
        "type": "account",
        "limits": _account_limits(jetstream=True),
        "signing_keys": scopes,
    }
    if revoked := revocations(home):
        claims["revocations"] = revoked
    return natsjwt.encode(ACCOUNT, account, "operator", read_key(home, "operator"), claims, datetime.now(UTC))


def write_account(home: Path) -> None:
    """Write the account's JWT where a server that starts on this home finds it; one that runs does not look there."""
    account = natsjwt.public("account", read_key(home, "account").public)
    _write(home / "nats" / "jwt" / f"{account}.jwt", account_jwt(home))


def revocations(home: Path) -> dict[str, int]:
    """User nkeys that were revoked, each with the second up to which JWTs for it count no more."""
    path = _revocations_file(home)
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, int])
    except FileNotFoundError:
        return {}
    except msgspec.MsgspecError as error:
        raise Refused(
            Code.SIGNATURE_INVALID, f"{path} does not read: {error}", "restore it: it says who was revoked"
        ) from None


def revoke(home: Path, public_nkey: str, until: datetime = FOR_GOOD) -> None:
    """Write down that JWTs for this user's key, issued up to `until`, count no more; `cli.revoke` tells the servers.

    Raises Refused(SIGNATURE_INVALID) for what is no user's nkey.
    """
    natsjwt.parse_public("user", public_nkey)
    known = revocations(home)
    known[public_nkey] = max(known.get(public_nkey, 0), int(until.timestamp()))
    _write(_revocations_file(home), msgspec.json.encode(known).decode())


def _revocations_file(home: Path) -> Path:
    return home / "keys" / "nats" / "revocations.json"


def system_creds(home: Path, at: datetime) -> str:
    """Credentials that may give servers a new account JWT, and nothing else, for five minutes.

    Raises Refused where `home` does not hold the installation's keys.
    """
    key = SigningKey.generate()
    allowed = Permissions(("$SYS.REQ.CLAIMS.UPDATE",), (f"{subjects.inbox('system')}.>",))
    claims = {"type": "user", **allowed.claims(), **natsjwt.UNLIMITED}
    subject, until = natsjwt.public("user", key.public), at + timedelta(minutes=5)
    token = natsjwt.encode("push", subject, "account", read_key(home, "system"), claims, at, until)
    return natsjwt.creds(token, natsjwt.seed("user", key))


def host_creds(home: Path, workspace: str, host: str, valid: timedelta = HOST_VALID) -> str:
    """New credentials for a host: the text of its `.creds` file, with a new key, which is also its signing key.

    Nothing is kept here, and the server needs no word of it. Raises Refused(NAME_INVALID) for a name that cannot be one,
    and where `home` holds no installation.
    """
    tags = (f"ws:{subjects.token(workspace)}",)
    return _user(home, "host", subjects.token(host), SigningKey.generate(), tags, valid)


def service_creds(home: Path, name: str) -> str:
    """New credentials for a service, with a new key, which is also its signing key. Raises Refused without an installation."""
    return _user(home, name, name, SigningKey.generate(), (), None)


def _user(
    home: Path, role: str, name: str, key: SigningKey, tags: tuple[str, ...], valid: timedelta | None
) -> str:
    """A user's credentials, signed with its role's key."""
    account = natsjwt.public("account", read_key(home, "account").public)
    now = datetime.now(UTC)
    until = now + valid if valid is not None else None
    token = natsjwt.user(read_key(home, f"role-{role}"), account, key.public, name, tags, now, until)
    return natsjwt.creds(token, natsjwt.seed("user", key))


def _write_issuer(home: Path) -> None:
    """What eligibility issues hosts' identities with. How long these count stays as somebody set it there."""
    path = home / "creds" / "eligibility.issuer"
    days = Issuer.load(path).host_days if path.exists() else HOST_VALID.total_seconds() / 86400
    issuer = Issuer(
        account=natsjwt.public("account", read_key(home, "account").public),
        host=natsjwt.seed("account", read_key(home, "role-host")),
        enrol=natsjwt.seed("account", read_key(home, "role-enrol")),
        host_days=days,
    )
    _write(path, msgspec.json.format(msgspec.json.encode(issuer), indent=2).decode() + "\n")


def _key_file(home: Path, name: str) -> Path:
    return home / "keys" / "nats" / f"{name}.nk"


def _keep_key(home: Path, name: str, kind: natsjwt.Kind) -> SigningKey:
    path = _key_file(home, name)
    if not path.exists():
        _write(path, natsjwt.seed(kind, SigningKey.generate()) + "\n")
    return read_key(home, name)


def read_key(home: Path, name: str) -> SigningKey:
    """One of the keys below keys/nats. Raises Refused(SIGNATURE_INVALID) where it is not there."""
    path = _key_file(home, name)
    try:
        return SigningKey.from_nkey(path.read_text().strip())
    except FileNotFoundError:
        raise Refused(
            Code.SIGNATURE_INVALID, f"there is no key {path}", "run 'loopback up' first, or name its --home"
        ) from None


def _account_limits(*, jetstream: bool) -> dict[str, Any]:
    unlimited = ("imports", "exports", "conn", "leaf")
    limits: dict[str, Any] = {**natsjwt.UNLIMITED, **dict.fromkeys(unlimited, -1), "wildcards": True}
    if jetstream:
        limits |= dict.fromkeys(("mem_storage", "disk_storage", "streams", "consumer", "max_ack_pending"), -1)
    return limits


def _configuration(place: Path, listen: str, system: str) -> str:
    encrypted = []
    folder = place.parent / "tls"
    if (folder / "server.pem").exists():
        files = {
            kind: msgspec.json.encode(str(folder / f"server.{kind}")).decode() for kind in ("pem", "key")
        }
        encrypted = [
            "# TLS alone. Clients may begin with the handshake, so that nobody talks them out of it.",
            f'tls {{ cert_file: {files["pem"]}, key_file: {files["key"]}, min_version: "1.3", handshake_first: auto }}',
        ]
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
        *encrypted,
    )
    return "\n".join(lines) + "\n"


def _write(path: Path, text: str) -> None:
    """Write a file that only its owner reads, whole or not at all, and durably."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, text.encode(), 0o600)
