"""Parsers of what travels: contracts, identities, talk on the host itself, and the bus. How entries are written: `targets`."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
from datetime import timedelta
from typing import Final

import msgspec
from activation_world import World
from support_decide import NOW, Host
from support_host import WORKSPACE, Signers

from loopback.cli import token
from loopback.contracts import (
    abi,
    desired,
    envelope,
    hostrecord,
    identity,
    messages,
    reports,
    rolloutfold,
    roster,
    subjects,
    trustdoc,
    view,
)
from loopback.contracts.codes import Refused
from loopback.contracts.keys import PublicKey
from loopback.contracts.rolloutstate import Workspace
from loopback.host import control, spawner
from loopback.host import identity as host_identity
from loopback.host import roster as host_roster
from loopback.host.form import check_form
from loopback.modules.sdk.module import decode_lenient
from loopback.services._runtime import wire
from loopback.services.telemetry import decide as telemetry
from loopback.services.telemetry import otlp
from loopback.trust import blobs, natsjwt

from .registry import CLEANUP, KEY, MALFORMED, OTHER, Made, goldens, same, target


@target("envelope", "json")
def _envelope() -> Made:
    good = envelope.seal_bytes(envelope.COMMAND, b'{"a": 1}', KEY, OTHER)
    keys = {KEY.keyid: KEY.public}

    def run(data: bytes) -> None:
        envelope.open_envelope(same(envelope.parse(data), envelope.parse), envelope.COMMAND, keys)

    return run, (good, *goldens("envelope.*.json"))


@target("command", "json", *MALFORMED)
def _command() -> Made:
    def run(data: bytes) -> None:
        command = same(messages.decode_command(data), messages.decode_command)
        hostrecord.read(command, None, command.workspace)

    return run, goldens(
        "*.put*.json",
        "host.*.json",
        "rollout.*.json",
        "*.publish*.json",
        "entitlement*.json",
        without="envelope",
    )


@target("policy-message", "json", *MALFORMED)
def _policy_message() -> Made:
    return (lambda data: same(messages.decode_policy(data), messages.decode_policy)), goldens("policy*.json")


@target("desired", "json", *MALFORMED)
def _desired() -> Made:
    return (lambda data: check_form(same(desired.decode(data), desired.decode))), goldens("desired*.json")


@target("desired-signed", "json")
def _desired_signed() -> Made:
    """As a host meets it: activation's key is stolen and signs whatever comes."""
    host = Host()
    entries = (host.entry(), host.entry(None, start={"scope": {"absent": True}}))
    seeds = tuple(msgspec.json.encode(host.document(entry)) for entry in entries)

    def run(data: bytes) -> None:
        host.check(envelope.seal(envelope.DESIRED, data, host.signers.activation))

    return run, seeds


@target("roster", "json")
def _roster() -> Made:
    """As a host meets it: activation's key is stolen and signs whatever comes."""
    signers, source = Signers(), roster.Source(labels={"role": "web"})
    digests = roster.digests([b"some", b""])
    made = roster.Roster(workspace=WORKSPACE, source=source, slices=digests, issued_at=NOW)

    def run(data: bytes) -> None:
        signed = envelope.seal(envelope.ROSTER, data, signers.activation)
        found = host_roster.opened(signed, host_roster.Followed(source=source), WORKSPACE, signers.trust, NOW)
        if found is not None:
            host_roster.accept(host_roster.Followed(source=source), found, {})

    return run, (msgspec.json.encode(made),)


@target("slice", "json")
def _slice() -> Made:
    signers, source = Signers(), roster.Source(labels={"role": "web"})
    put = messages.HostPut(
        **signers.times(),
        host="web-1",
        public_key="00" * 32,
        labels={"role": "web"},
        addresses=("10.0.0.1/24", "::1"),
    )
    made = roster.Slice(members=(roster.Member(signers.command(put)),))

    def run(data: bytes) -> None:
        digest = hashlib.sha256(data).hexdigest()
        host_roster.slice_members(data, digest, source, WORKSPACE, signers.trust, {})

    return run, (msgspec.json.encode(made),)


@target("report", "json", *MALFORMED)
def _report() -> Made:
    later = NOW + timedelta(seconds=30)

    def run(data: bytes) -> None:
        report = same(reports.decode(data), reports.decode)
        seen = telemetry.fold_view(None, report, NOW)
        again = telemetry.fold_view(seen, report, later)
        for found in filter(None, (seen, again)):
            telemetry.mark_lost(found, later)
            telemetry.changed_phases(None, found, report)
            telemetry.figures([found])

    return run, goldens("inventory*.json", "status*.json", "heartbeat*.json")


@target("journal", "prefixed-json", *MALFORMED)
def _journal() -> Made:
    """A link after so many good ones (the first byte), and, where its highest bit is set, one that continues their chain."""
    world = World(2)
    world.begin()
    world.finish()
    log = world.log[:10]
    others = goldens("journal*.json")

    def run(data: bytes) -> None:
        choice = data[0] if data else 0
        workspace, content = Workspace("prod"), data[1:]
        for stored in log[: (choice & 0x7F) % len(log)]:
            rolloutfold.fold(workspace, stored)
        if choice & 0x80 and (rollout := workspace.rollouts.get("r1")):
            content = _continuing(content, rollout.seq + 1, rollout.head)
        rolloutfold.fold(workspace, content)
        rolloutfold.fold(workspace, content)

    return run, (
        *(bytes((n | 0x80,)) + link for n, link in enumerate(log)),
        *(b"\x83" + link for link in others),
    )


def _continuing(data: bytes, seq: int, prev: str) -> bytes:
    """The same link as the next one of a chain."""
    try:
        found = msgspec.json.decode(data)
        return msgspec.json.encode({**found, "workspace": "prod", "rollout": "r1", "seq": seq, "prev": prev})
    except (msgspec.MsgspecError, TypeError, ValueError, RecursionError):
        return data


@target("trust-document", "json")
def _trust_document() -> Made:
    made = msgspec.json.encode(Signers().document)

    def run(data: bytes) -> None:
        trust = trustdoc.Trust.decode(data)
        for keyid in trust.operators:
            trust.roles(keyid, WORKSPACE)
        trust.rules(WORKSPACE)

    return run, (made, *goldens("trustdocument*.json"))


@target("claim", "json")
def _claim() -> Made:
    """As a host signs it that holds a token, or as a stranger does."""
    token, own = KEY, OTHER
    fields = Signers(clock=lambda: NOW).times()
    invite = messages.HostInvite(
        **fields, host="h1", claim_key=token.public.text, claim_before=NOW + timedelta(hours=1)
    )
    good = hostrecord.claim(invite, token, own, NOW)

    def run(data: bytes) -> None:
        hostrecord.open_claim(envelope.seal(envelope.CLAIM, data, token, own), invite)

    return run, (envelope.payload_of(good), *goldens("claim*.json"))


@target("enrolment", "json", *MALFORMED)
def _enrolment() -> Made:
    """What eligibility is asked by whoever holds a token."""

    def run(data: bytes) -> None:
        hostrecord.peek(same(identity.decode_enrol(data), identity.decode_enrol).claim)

    claim = hostrecord.claim_to("i", "h1", WORKSPACE, KEY, OTHER, NOW)
    return run, (msgspec.json.encode(identity.Enrol(claim=claim)), *goldens("enrol*.json"))


@target("renewal", "json", *MALFORMED)
def _renewal() -> Made:
    return identity.decode_renew, goldens("renew*.json")


@target("granted", "json", *MALFORMED)
def _granted() -> Made:
    """What anybody may land on a host's own subject."""
    host = Host()
    times = host.signers.times()
    move = messages.HostMove(**times, host="h1", public_key=host.key.public.text, to="lab")
    jwt = natsjwt.user(KEY, "ACC", host.key.public, "h1", ("ws:prod",), NOW, NOW + timedelta(hours=1))
    good = identity.Granted(at=NOW, jwt=jwt, move=host.signers.command(move))

    def run(data: bytes) -> None:
        found = identity.decode_granted(data)
        host_identity.check_jwt(found.jwt, "h1", "prod", host.key.public, NOW)
        if found.move is not None:
            host_identity.check_move(found.move, "h1", "prod", host.key.public, None, host.signers.trust)

    return run, (msgspec.json.encode(good), *goldens("granted*.json"))


@target("jwt", "json")
def _jwt() -> Made:
    """The part of a JWT that says something, inside one that is otherwise whole."""
    token = natsjwt.user(KEY, "ACC", OTHER.public, "h1", ("ws:prod",), NOW, NOW + timedelta(hours=1))
    part = token.split(".")[1]
    good = base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))

    def run(data: bytes) -> None:
        claims = natsjwt.read(f"e30.{base64.urlsafe_b64encode(data).decode()}.sig")
        assert claims.issued_at.tzinfo is not None
        assert claims.expires_at is None or claims.expires_at.tzinfo is not None
        assert all(isinstance(tag, str) for tag in claims.tags)

    return run, (good,)


@target("nkey", "bytes")
def _nkey() -> Made:
    def run(data: bytes) -> None:
        text = data.decode("utf-8", "replace")
        assert natsjwt.public("user", natsjwt.parse_public("user", text)) == text

    return run, (natsjwt.public("user", KEY.public).encode(),)


@target("token", "bytes")
def _token() -> Made:
    """An invitation's token: as a line, and its inside with a checksum that matches."""
    good = token.Token(
        url="nats://h:1",
        host="h",
        workspace="w",
        invite="i",
        seed=bytes(32),
        jwt="a.b.c",
        root=bytes(32),
        root_version=1,
    )

    def run(data: bytes) -> None:
        inner = data + hashlib.sha256(data).digest()[:4]
        for line in (
            data.decode("utf-8", "replace"),
            token.PREFIX + base64.urlsafe_b64encode(inner).decode(),
        ):
            with contextlib.suppress(Refused):
                found = token.read(line)
                assert token.read(token.write(found)) == found
        token.read(token.PREFIX + base64.urlsafe_b64encode(inner).decode())

    return run, (msgspec.msgpack.encode(good), token.write(good).encode())


@target("view", "json", *MALFORMED)
def _view() -> Made:
    def run(data: bytes) -> object:
        found = same(view.decode(data), view.decode)
        return found.state

    return run, goldens("view*.json")


@target("subject", "bytes")
def _subject() -> Made:
    def run(data: bytes) -> None:
        text = data.decode("utf-8", "replace")
        errors = []
        for parse in (subjects.parse, subjects.tuf_name, reports.sender, subjects.untoken):
            try:
                found = parse(text)
            except Refused as refused:
                errors.append(refused)
                continue
            if parse is subjects.untoken:
                assert subjects.token(str(found)) == text, "two tokens for one name"
        if len(errors) == 3:  # of four: any text is or is not the subject of a metadata file
            raise errors[-1]

    seeds = (
        "lb.ws.prod.from.web-1_2eexample.status",
        "lb.ws.prod.cmd.activation.start",
        "lb.tuf.1_2eroot_2ejson",
        "web-1_2eexample",
    )
    return run, tuple(seed.encode() for seed in seeds)


@target("public-key", "text")
def _public_key() -> Made:
    return (lambda data: PublicKey.parse(data.decode("utf-8", "replace"))), (KEY.public.text.encode(),)


@target("abi-frame", "msgpack")
def _abi_frame() -> Made:
    def run(data: bytes) -> None:
        abi.length_of(len(data).to_bytes(4, "big"))
        frame = decode_lenient(data)
        sent = abi.encode(frame)
        assert abi.encode(abi.decode(sent[4:])) == sent  # bytes, since a NaN is not equal to itself

    return run, tuple(bytes.fromhex(text.decode())[4:] for text in goldens("abi.*.hex"))


# Identities, and talk on the host itself

TOKEN: Final = token.Token(
    url="tls://bus.example:4222", host="web-1", workspace="prod", invite="c1", seed=b"\7" * 32, jwt="a.b.c",
    root=b"\x08" * 32, root_version=1,
)  # fmt: skip


@target("token-content", "msgpack")
def _token_content() -> Made:
    """With a checksum that is right: it is no secret."""

    def run(data: bytes) -> None:
        line = base64.urlsafe_b64encode(data + hashlib.sha256(data).digest()[:4]).rstrip(b"=")
        token.read(token.PREFIX + line.decode())

    return run, (msgspec.msgpack.encode(TOKEN),)


@target("spawner-request", "json", *MALFORMED)
def _spawner_request() -> Made:
    """What a stolen agent may send to the process that has the host's capabilities."""
    return spawner._REQUEST.decode, (b'{"type": "end", "pid": 1}', b'{"type": "prepare"}')


@target("control-request", "json", *MALFORMED)
def _control_request() -> Made:
    return control._REQUESTS.decode, (b'{"type": "status"}', b'{"type": "log-level", "level": "debug"}')


# The bus


@target("nats-headers", "text")
def _nats_headers() -> Made:
    def run(data: bytes) -> None:
        found = wire.read_headers(data)
        assert all(isinstance(k, str) and isinstance(v, str) and v == v.strip() for k, v in found.items())

    return run, (
        b"NATS/1.0\r\nNats-Msg-Id: a\r\ntraceparent: 00-1-2-01\r\n\r\n",
        b"NATS/1.0 404 No Message\r\nStatus: 404\r\nce-id: x:y\r\n\r\n",
    )


@target("blob", "bytes")
def _blob() -> Made:
    """Header text up to the first newline, the rest is the stored chunk; the digest asked for is that of the good content."""
    good = b"content " * 40
    digest = hashlib.sha256(good).hexdigest()
    runner = CLEANUP.enter_context(asyncio.Runner())

    def run(data: bytes) -> None:
        size, _, chunk = data.partition(b"\n")
        headers = {blobs.SIZE_HEADER: size.decode("utf-8", "replace")}

        async def get(subject: str) -> tuple[bytes, dict[str, str]] | None:
            return (chunk, headers) if subject.endswith(".0") else None

        found = runner.run(blobs.read(get, digest))
        assert found == good

    return run, (b"%d\n" % len(good) + good, b"0\n", b"999999999999\nx", b"131073\n" + bytes(500))


@target("otlp", "bytes")
def _otlp() -> Made:
    seeds = []
    for name in ("traces", "metrics"):
        kind = envelope.OTLP_TRACES if name == "traces" else envelope.OTLP_METRICS
        request = otlp.ExportTraceServiceRequest() if name == "traces" else otlp.ExportMetricsServiceRequest()
        part = (request.resource_spans if name == "traces" else request.resource_metrics).add()  # type: ignore[union-attr]
        added = part.resource.attributes.add()
        added.key, added.value.string_value = "host.name", "somebody else"
        seeds.append((b"t" if name == "traces" else b"m") + request.SerializeToString())
        otlp.stamp(request.SerializeToString(), kind, "h", "w")

    def run(data: bytes) -> None:
        kind = envelope.OTLP_TRACES if data[:1] == b"t" else envelope.OTLP_METRICS
        made = otlp.stamp(data[1:], kind, "web-1", "prod")
        request = (
            otlp.ExportTraceServiceRequest if data[:1] == b"t" else otlp.ExportMetricsServiceRequest
        ).FromString(made)
        resources = request.resource_spans if data[:1] == b"t" else request.resource_metrics  # type: ignore[union-attr]
        for part in resources:
            said = [a.value.string_value for a in part.resource.attributes if a.key == "host.name"]
            assert said == ["web-1"], "a host speaks for another one"

    return run, tuple(seeds)
