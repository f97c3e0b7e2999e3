"""`loopback eligibility`: why a host may or may not have a module."""

from __future__ import annotations

import asyncio
from typing import Annotated

import msgspec
import typer

from loopback.cli import context, fleetio, printing
from loopback.contracts import subjects
from loopback.contracts.codes import Code, Refusal, Refused
from loopback.contracts.messages import Check, Offer, OfferedVersion

EXIT_NO = 1

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Eligibility: which modules and versions a host may have.",
)


@app.callback()
def group() -> None:
    """Keeps `explain` a word of its own, though it is the only command."""


@app.command("explain")
def explain(
    host: Annotated[str, typer.Argument(help="The host.")],
    module: Annotated[str, typer.Argument(help="The module.")],
    workspace: Annotated[str | None, typer.Option(help="The host's workspace.")] = None,
    version: Annotated[str | None, typer.Option(help="A version; without it, the best one.")] = None,
    json: fleetio.Json = False,
) -> None:
    """Say whether a host may have a module, naming each rule that passed or failed. Exit code 0: yes, 1: no."""
    answer = asyncio.run(_judged(host, module, workspace, version))
    if json:
        fleetio.print_json({"host": host, "eligible": answer.refusal is None, **msgspec.to_builtins(answer)})
    else:
        typer.echo(printing.lines(render(host, answer)))
    if answer.refusal is not None:
        raise typer.Exit(EXIT_NO)


async def _judged(host: str, module: str, workspace: str | None, version: str | None) -> OfferedVersion:
    async with context.connect() as session:
        place = workspace or await _workspace_of(session, host)
        found = await session.last(subjects.STREAM_FLEET, subjects.offer(place, host))
        if found is None:
            known = {h.host for h in await fleetio.hosts(session, place)}
            return nothing(host, module, version, host in known)
        return choose(msgspec.json.decode(found, type=Offer), module, version)


async def _workspace_of(session: context.Session, host: str) -> str:
    places = [h.workspace for h in await fleetio.hosts(session) if h.host == host]
    if len(places) > 1:
        raise Refused(
            Code.WORKSPACE_UNKNOWN,
            f"the host {host!r} is in several workspaces: {', '.join(places)}",
            "name one with --workspace",
        )
    return places[0] if places else await fleetio.only_workspace(session, None)


def nothing(host: str, module: str, version: str | None, recorded: bool) -> OfferedVersion:
    """The answer where eligibility has published no offer for the host."""
    if recorded:
        refusal = Refusal(
            Code.ELIGIBILITY_NO_RELEASE,
            f"no offer for {host!r} is published yet: there is no release, or eligibility does not run",
            "publish a release with 'loopback module publish'; see that 'loopback up' runs",
        )
        checks: tuple[Check, ...] = (Check("record", True, host), Check("release", False, "none"))
    else:
        refusal = Refusal(
            Code.ELIGIBILITY_NO_RECORD,
            f"no record names the host {host!r}",
            "add it with 'loopback host add'",
        )
        checks = (Check("record", False, "none"),)
    return OfferedVersion(
        module=module, version=version or "", digest="", rule="", refusal=refusal, checks=checks
    )


def choose(offer: Offer, module: str, version: str | None) -> OfferedVersion:
    """What an offer says of a version; without one, of the newest that the host may have, else of the newest at all."""
    found = [v for v in offer.versions if v.module == module and version in (None, v.version)]
    if not found:
        what = f"{module} {version}" if version else module
        return OfferedVersion(
            module=module,
            version=version or "",
            digest="",
            refusal=Refusal(
                Code.ELIGIBILITY_NO_RELEASE,
                f"there is no release of {what}",
                "publish it with 'loopback module publish'",
            ),
            checks=(Check("record", True, offer.host), Check("release", False, f"no release of {what}")),
        )
    return next((v for v in found if v.refusal is None), found[0])


def render(host: str, answer: OfferedVersion) -> str:
    """The answer for people: the verdict, then every rule as it was applied."""
    what = f"{answer.module} {answer.version}".strip()
    lines = [f"{host} {'may' if answer.refusal is None else 'may NOT'} have {what}"]
    width = max((len(c.rule) for c in answer.checks), default=0)
    lines += [f"  {'✓' if c.passed else '✗'} {c.rule.ljust(width)}  {c.detail}" for c in answer.checks]
    if answer.refusal is not None:
        lines.append(f"  {answer.refusal.reason}  [{answer.refusal.code}]")
        if answer.refusal.next_step:
            lines.append(f"  next: {answer.refusal.next_step}")
    return "\n".join(lines)
