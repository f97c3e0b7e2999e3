"""`loopback audit`: who did what, by which signature, and whether the journal is the one that hosts witnessed."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

import msgspec
import typer

from loopback.cli import auditing, context, evidence, fleetio, printing, witnessing
from loopback.cli.auditing import Act, Audit
from loopback.cli.evidence import Evidence, Trusted
from loopback.cli.witnessing import Journal
from loopback.contracts import hostrecord
from loopback.contracts.codes import Code, Refused
from loopback.contracts.hostrecord import HostRecord
from loopback.contracts.keys import PublicKey
from loopback.contracts.rolloutstate import Workspace
from loopback.contracts.trustdoc import Trust
from loopback.services._runtime.streams import COMMANDS_KEPT

EXIT_EVIDENCE: Final = 1
_KEPT: Final = timedelta(seconds=COMMANDS_KEPT / 10**9)
_AGO = re.compile(r"([0-9]{1,6})(min|h|d|w)")
_UNITS: Final = {"min": "minutes", "h": "hours", "d": "days", "w": "weeks"}


class Examined(NamedTuple):
    """One workspace's evidence and everything that was made of it."""

    evidence: Evidence
    trusted: Trusted
    journal: Journal
    state: Workspace
    audit: Audit
    hosts: dict[str, HostRecord]

    @property
    def good(self) -> bool:
        """Whether nothing speaks of rewriting, cutting or inventing."""
        return self.journal.intact and not any(f.evidence for f in self.audit.findings)


def audit_command(
    workspace: Annotated[
        str | None, typer.Option("--workspace", help="Which; needed if there are several.")
    ] = None,
    since: Annotated[
        str,
        typer.Option(
            metavar="TIME",
            help="Only acts since then: 2026-11-25, 2026-11-25T09:30, or 30min, 6h, 2d, 1w ago.",
        ),
    ] = "",
    rollout: Annotated[str, typer.Option(metavar="ID", help="Only acts about this rollout.")] = "",
    host: Annotated[str, typer.Option(help="Only acts about this host, rollouts to it among them.")] = "",
    operator: Annotated[str, typer.Option(metavar="NAME", help="Only acts of this operator.")] = "",
    known_loss: Annotated[
        int | None,
        typer.Option(
            metavar="LINKS",
            min=0,
            help="The journal was restored from a backup that ended after so many links: hosts that witnessed more, and "
            "agree up to there, do not count against it.",
        ),
    ] = None,
    export: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the signed bytes that this rests on to a file.")
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="Verify such a file instead of asking the bus."),
    ] = None,
    root: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The pinned TUF root; default: this installation's.")
    ] = None,
    json: fleetio.Json = False,
) -> None:
    """Who did what, when, by which signature; and whether the journal was rewritten or cut.

    Every command, record and rollout is verified here again, whatever services say of it. The journal is compared with what
    hosts witnessed of it, by their own signed reports. Exit codes: 0 nothing speaks against it · 1 evidence that something was
    rewritten, removed or invented · 2 refused.
    """
    wanted = since_when(since, datetime.now(UTC)) if since else None

    async def run() -> Examined:
        if source is not None:
            if workspace is not None or export is not None:
                raise Refused(
                    Code.CONFIG_INVALID,
                    "--from reads one workspace's evidence: leave --workspace and --export out",
                )
            found = evidence.load(source)
            return await examine(found, pinned(root), None, datetime.now(UTC), known_loss)
        async with context.connect() as session:
            place = await fleetio.only_workspace(session, workspace)
            found = await evidence.gather(session, place, datetime.now(UTC))
        if export is not None:
            evidence.save(found, export)
            again = f"loopback audit --from {export.name} --root root.json"
            typer.echo(f"wrote {export}; verify it anywhere with '{again}'", err=True)
        return await examine(found, pinned(root), memory(root), datetime.now(UTC), known_loss)

    found = asyncio.run(run())
    members = {name: r.members for name, r in found.state.rollouts.items()}
    acts = auditing.chosen(
        found.audit.acts, since=wanted, rollout=rollout, host=host, operator=operator, members=members
    )
    if json:
        fleetio.print_json(plain(found, acts))
    else:
        show(found, acts)
    if not found.good:
        raise typer.Exit(EXIT_EVIDENCE)


def pinned(root: Path | None) -> bytes:
    """The root that everything rests on. Raises Refused(TUF_INVALID)."""
    path = root or context.home() / "tuf" / "root.json"
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise Refused(
            Code.TUF_INVALID,
            f"there is no pinned root {path}",
            "name one with --root, from a place that you trust",
        ) from None


def memory(root: Path | None) -> Path | None:
    """Where the installation's own TUF client remembers what it verified; None for somebody else's root."""
    return None if root is not None else context.home() / "tuf" / "client"


async def examine(
    found: Evidence, root: bytes, client: Path | None, now: datetime, known_loss: int | None = None
) -> Examined:
    """Verify everything. Raises Refused(TUF_*) where there is no trust document to judge by."""
    trusted = await evidence.verified(found, root, client, now)
    trusts = (trusted.trust, *trusted.earlier)
    hosts = host_records(found, trusts)

    def key_of(workspace: str, host: str) -> PublicKey | None:
        record = hosts.get(host) if workspace == found.workspace else None
        return PublicKey.parse(record.public_key) if record else None

    journal, state, links = witnessing.examine(found, key_of, hosts, known_loss)
    audit = auditing.Auditor(found, trusts, _KEPT).run(links)
    findings = [*audit.findings, *_releases(found, trusted)]
    return Examined(found, trusted, journal, state, Audit(audit.acts, tuple(findings)), hosts)


def host_records(found: Evidence, trusts: Sequence[Trust]) -> dict[str, HostRecord]:
    """The hosts that are there, by the newest record of each that an operator of then or now signed."""
    newest: dict[str, tuple[tuple[int, int], HostRecord]] = {}
    for stored in found.records:
        try:
            record = evidence.RECORDS.decode(stored.data)
        except (msgspec.MsgspecError, RecursionError):
            continue
        if record.kind != "host":
            continue
        order = (record.sequence, stored.sequence)
        for trust in trusts:
            try:
                read = hostrecord.verify(record.envelope, record.claim, found.workspace, trust)
            except Refused:
                continue
            if read.host not in newest or newest[read.host][0] < order:
                newest[read.host] = (order, read)
            break
    return {host: read for host, (_, read) in newest.items() if not read.absent}


def _releases(found: Evidence, trusted: Trusted) -> list[auditing.Finding]:
    """What the catalog has must be what TUF's signers signed."""
    findings = []
    for release in evidence.releases(found):
        target = trusted.targets.get(release.target)
        name = f"{release.module} {release.version} ({release.digest[:12]})"
        if target is None:
            findings.append(
                auditing.Finding(
                    "release", f"the catalog has {name}, which nobody entitled to has signed", evidence=False
                )
            )
        elif target.sha256 != release.digest:
            findings.append(
                auditing.Finding("release", f"the catalog has {name}, but {target.sha256[:12]} was signed")
            )
    return findings


# What is shown


def plain(found: Examined, acts: Sequence[Act]) -> dict[str, Any]:
    """As `--json` shows it."""
    journal = found.journal
    return {
        "workspace": found.evidence.workspace,
        "at": found.evidence.at,
        "good": found.good,
        "acts": list(acts),
        "releases": release_lines(found),
        "findings": list(found.audit.findings),
        "journal": {
            "intact": journal.intact,
            "links": journal.links,
            "head": journal.head,
            "broken": list(journal.broken),
            "words": list(journal.words),
            "hosts": list(journal.hosts),
            "verdict": witnessing.summary(journal),
        },
        "trust_expired": found.trusted.expired,
    }


def release_lines(found: Examined) -> list[dict[str, Any]]:
    """Releases in order of time, with the keys that signed each, by the verified repository."""
    lines = []
    for release in sorted(evidence.releases(found.evidence), key=lambda r: r.published_at):
        target = found.trusted.targets.get(release.target)
        lines.append(
            {
                "module": release.module,
                "version": release.version,
                "digest": release.digest,
                "published_at": release.published_at,
                "operators": release.operators,
                "signers": target.signers if target else (),
                "signed": target is not None and target.sha256 == release.digest,
            }
        )
    return lines


def show(found: Examined, acts: Sequence[Act]) -> None:
    """For people: acts, releases, then what does not fit and the verdict."""
    fleetio.table(
        ("TIME (UTC)", "WHO", "WHAT", "ON", "OUTCOME", "SIGNATURE", "KEY"),
        [
            (
                act.at.strftime("%Y-%m-%d %H:%M:%S"),
                ", ".join(act.who),
                act.what,
                act.on,
                outcome(act),
                act.signature,
                ", ".join(k[:12] for k in act.keyids),
            )
            for act in acts
        ],
    )
    releases = release_lines(found)
    if releases:
        typer.echo()
        fleetio.table(
            ("RELEASE", "DIGEST", "PUBLISHED (UTC)", "BY", "SIGNED WITH"),
            [
                (
                    f"{r['module']} {r['version']}",
                    r["digest"][:12],
                    r["published_at"].strftime("%Y-%m-%d %H:%M:%S"),
                    ", ".join(r["operators"]),
                    ", ".join(k[:12] for k in r["signers"]) if r["signed"] else "not signed",
                )
                for r in releases
            ],
        )
    typer.echo()
    for finding in found.audit.findings:
        typer.echo(printing.printable(f"{'!' if finding.evidence else '-'} {finding.what}: {finding.words}"))
    for line in witnessing.summary(found.journal):
        typer.echo(printing.printable(f"journal: {line}"))
    if found.trusted.expired:
        typer.echo(
            f"note: {found.trusted.expired}; judged as of {found.evidence.at:%Y-%m-%d %H:%M:%S}", err=True
        )
    if not found.good:
        typer.echo(
            "next: keep this with --export FILE, compare it with a backup, and take the keys of services and broker out of use",
            err=True,
        )


def outcome(act: Act) -> str:
    """An act's outcome with why."""
    code = f" [{act.code}]" if act.code else ""
    reason = f": {act.reason[:120]}" if act.reason and act.outcome != "accepted" else ""
    return f"{act.outcome}{code}{reason}"


def since_when(text: str, now: datetime) -> datetime:
    """A point in time, as written after --since; without a zone it is UTC. Raises Refused(NAME_INVALID)."""
    try:
        if ago := _AGO.fullmatch(text):
            return now - timedelta(**{_UNITS[ago[2]]: int(ago[1])})
        found = datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        raise Refused(
            Code.NAME_INVALID,
            f"--since {text!r} is no time",
            "write it like 2026-11-25, 2026-11-25T09:30, or 2d",
        ) from None
    return found if found.tzinfo else found.replace(tzinfo=UTC)
