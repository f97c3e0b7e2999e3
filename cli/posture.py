"""`loopback posture`: what a security team asks of a workspace, answered from the live state."""

from __future__ import annotations

import asyncio
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
import typer

from loopback.cli import audit, context, evidence, fleetio, posturedoc, posturehosts, posturemd, posturing
from loopback.cli.audit import Examined
from loopback.cli.posturing import Contents
from loopback.contracts.codes import Refused
from loopback.trust import package
from loopback.trust.package import PackageInfo

AT_ONCE: Final = 4  # contents fetched at a time


def posture_command(
    workspace: Annotated[str, typer.Argument(help="The workspace.")],
    format: Annotated[  # the option's name, as people know it from other tools
        Literal["markdown", "json"], typer.Option(help="JSON is described in docs/posture.md.")
    ] = "markdown",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write to a file instead of stdout.")
    ] = None,
) -> None:
    """What is on where, since when and by whom, how it was signed, what it can touch, and who is not as they should be.

    Everything is read from the bus now and verified from the pinned root on; every section names its sources, and what cannot
    be answered is listed. Exit codes: 0 written · 2 refused. Whether the journal is intact is a part of it; 'loopback audit'
    says more.
    """

    async def run() -> posturedoc.Posture:
        async with context.connect() as session:
            place = await fleetio.only_workspace(session, workspace)
            found = await evidence.gather(session, place, datetime.now(UTC))
            examined = await audit.examine(found, audit.pinned(None), audit.memory(None), datetime.now(UTC))
            contents = await _contents(session, examined)
        return posturing.build(examined, contents, datetime.now(UTC))

    posture = asyncio.run(run())
    if format == "json":
        text = msgspec.json.format(msgspec.json.encode(posture), indent=2).decode() + "\n"
    else:
        text = posturemd.render(posture)
    if out is None:
        typer.echo(text, nl=False)
        return
    out.write_text(text)
    typer.echo(f"wrote {out}", err=True)


async def _contents(session: context.Session, examined: Examined) -> Contents:
    """The packages that are in use, or were published last of each module, and the policies in use; each verified."""
    used = posturehosts.promoted(posturehosts.seen_hosts(examined))
    releases = {r.digest: r for r in evidence.releases(examined.evidence)}
    newest = {r.module: r.digest for r in sorted(releases.values(), key=lambda r: r.published_at)}
    wanted = {running.package for _, running in used} | set(newest.values())
    gate = asyncio.Semaphore(AT_ONCE)
    packages: dict[str, PackageInfo] = {}
    policies: dict[str, bytes] = {}

    async def one_package(digest: str) -> None:
        release = releases.get(digest)
        if release is None or not 0 < release.size <= package.MAX_PACKAGE:
            return
        async with gate:
            try:
                data = await session.blob(digest, release.size)
                packages[digest] = await asyncio.to_thread(_inspect, data, digest)
            except Refused:
                return  # the document says that it could not be had

    async def one_policy(digest: str) -> None:
        async with gate:
            try:
                policies[digest] = await session.blob(digest)
            except Refused:
                return

    async with asyncio.TaskGroup() as group:
        for digest in wanted:
            group.create_task(one_package(digest))
        for digest in {running.policy for _, running in used if running.policy}:
            group.create_task(one_policy(digest))
    return Contents(packages, policies)


def _inspect(data: bytes, digest: str) -> PackageInfo:
    with tempfile.TemporaryDirectory(prefix="loopback-posture-") as folder:
        path = Path(folder) / "package.lbm"
        path.write_bytes(data)
        return package.inspect(path, sha256=digest)
