"""`loopback rollout`: plan, start, watch and steer rollouts."""

from __future__ import annotations

import asyncio
import sys
from contextlib import aclosing, nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import typer
from rich.console import Console
from rich.live import Live

from loopback.cli import (
    context,
    fleetio,
    keyring,
    policyfile,
    rolloutapprove,
    rolloutfile,
    rolloutview,
    trusted,
)
from loopback.cli.rolloutfile import RolloutFile
from loopback.contracts import exposure, rolloutplan, subjects
from loopback.contracts.codes import Code, Refused
from loopback.contracts.messages import (
    Release,
    RolloutAbort,
    RolloutPause,
    RolloutResume,
    RolloutStart,
    Scope,
    WorkspacePut,
)
from loopback.contracts.rolloutfold import fold
from loopback.contracts.rolloutstate import FINAL, Rollout, State, WaveState, Workspace
from loopback.contracts.trustdoc import WorkspaceRules

EXIT_CODES: Final = {
    State.DONE: 0,
    State.ROLLED_BACK: 3,
    State.HALTED: 4,
    State.PAUSED: 4,
    State.AWAITING_APPROVAL: 4,
    State.ROLLBACK_INCOMPLETE: 5,
    State.CANCELED: 6,
}
CLOCK_SLACK: Final = timedelta(minutes=5)  # by which an operator's clock may be ahead of the broker's

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Rollouts: bring a version and a policy to hosts, wave by wave.\n\n"
    "Exit codes of 'watch' and 'start --watch': 0 DONE · 3 ROLLED_BACK · 4 HALTED, PAUSED or AWAITING_APPROVAL (a "
    "person is needed) · "
    "5 ROLLBACK_INCOMPLETE · 6 CANCELED or refused by eligibility or delivery · 2 the command itself was refused.",
)

File = Annotated[Path, typer.Argument(help="The rollout file (YAML).")]
Id = Annotated[str, typer.Argument(metavar="ROLLOUT", help="The rollout's id.")]
In = Annotated[str | None, typer.Option("--workspace", help="Its workspace; needed if there are several.")]
Why = Annotated[str, typer.Option(help="A line for the journal.")]
Serial = Annotated[
    int | None,
    typer.Option("--policy-serial", help="Serial of the policy; without it, one above the last in use."),
]


async def folded(session: context.Session, workspace: str) -> Workspace:
    """A workspace's rollouts, as they are now."""
    state = Workspace(workspace)
    stream = subjects.workspace_stream(workspace)
    for message in await session.read(stream, [subjects.rollout(workspace, "*", "*")]):
        fold(state, message.data)
    return state


def find(state: Workspace, rollout: str) -> Rollout:
    """The rollout. Raises Refused(ROLLOUT_UNKNOWN)."""
    if rollout not in state.rollouts:
        raise Refused(
            Code.ROLLOUT_UNKNOWN,
            f"there is no rollout {rollout!r} in workspace {state.name!r}",
            "see 'loopback rollout list'",
        )
    return state.rollouts[rollout]


# Planning and starting


class _Prepared(msgspec.Struct):
    command: RolloutStart
    policy: policyfile.Signed | None
    hosts: dict[str, dict[str, str]]


async def _release(session: context.Session, file: RolloutFile) -> Release | None:
    if file.absent:
        return None
    found = [
        msgspec.json.decode(m.data, type=Release)
        for m in await session.read(subjects.STREAM_CATALOG, [subjects.catalog(file.module, "*")], last=True)
    ]
    for release in found:
        if release.version == file.version:
            return release
    known = ", ".join(sorted(r.version for r in found)) or "none"
    raise Refused(
        Code.PACKAGE_UNKNOWN,
        file.place(f"version: there is no release of {file.module} {file.version}; published: {known}"),
        "publish it with 'loopback module publish'",
    )


async def prepare(session: context.Session, file: RolloutFile, serial: int | None) -> _Prepared:
    """The signed-to-be command for a file, and its signed policy. Raises Refused naming file and line."""
    content = policyfile.content(file.policy, file.module) if file.policy is not None else None
    release = await _release(session, file)
    fields = context.new_command_fields(file.workspace)
    policy = None
    number = 0
    if content is not None:
        if serial is None:
            state = await folded(session, file.workspace)
            used = [
                r.created.policy_serial for r in state.rollouts.values() if r.created.module == file.module
            ]
            serial = max(used, default=0) + 1
        number = serial
        policy = policyfile.sign(
            content,
            workspace=file.workspace,
            module=file.module,
            name=file.policy.stem if file.policy else "",
            serial=serial,
            at=fields["issued_at"],
            key=session.context.key,
        )
    scope = Scope(
        workspace=file.workspace,
        module=file.module,
        packages={release.version: release.digest} if release else {},
        policy=policy.digest if policy else None,
        policy_serial=number,
        selector=file.selector,
        not_before=fields["issued_at"] - CLOCK_SLACK,
        not_after=fields["issued_at"] + file.valid,
        on_failure=file.on_failure,
        absent=file.absent,
    )
    command = RolloutStart(
        **fields,
        rollout=file.rollout,
        module=file.module,
        version=file.version,
        waves=file.waves,
        scope=scope,
        gates=file.gates,
        max_unavailable=file.max_unavailable,
        host_deadline_s=file.host_deadline_s,
        trial_s=file.trial_s,
        policy_name=file.policy.stem if file.policy else "",
    )
    records = await fleetio.hosts(session, file.workspace)
    hosts = {record.host: dict(record.labels) for record in records}
    try:
        rolloutplan.check(command)
        rolloutplan.members(command, hosts)
    except Refused as refused:
        raise Refused(refused.code, file.place(refused.reason), refused.next_step) from None
    return _Prepared(command, policy, hosts)


@app.command("plan")
def plan(file: File, policy_serial: Serial = None, json: fleetio.Json = False) -> None:
    """Show who would get it when, and what the signature would permit at most. Changes nothing."""
    read = rolloutfile.load(file)

    async def run() -> tuple[_Prepared, WorkspaceRules]:
        async with context.connect() as session:
            prepared = await prepare(session, read, policy_serial)
            return prepared, (await trusted.trusted(session)).trust.rules(read.workspace)

    found, rules = asyncio.run(run())
    command = found.command
    members = rolloutplan.members(command, found.hosts)
    waves = rolloutplan.plan(command.waves, members)
    at_once = max(1, rolloutplan.share(command.max_unavailable, len(members)))
    second = ["approver (another operator)"] if rules.regulated else []
    found_exposure = exposure.exposure(command, rules, [m.host for m in members])
    if json:
        fleetio.print_json(
            {
                "rollout": command.rollout,
                "workspace": command.workspace,
                "module": command.module,
                "version": command.version,
                "waves": [{"name": w.name, "hosts": list(w.hosts), "soak_s": w.soak_s} for w in waves],
                "at_once": at_once,
                "policy": found.policy.plain() if found.policy else None,
                "regulated": rules.regulated,
                "roles_needed": ["releaser", *(["author"] if found.policy else []), *second],
                "exposure": msgspec.to_builtins(found_exposure),
            }
        )
        return
    typer.echo(f"{command.rollout}: {command.module} {command.version or 'absent'} in {command.workspace}")
    for wave in waves:
        soak = f", then {wave.soak_s:g} s of soak" if wave.soak_s else ""
        typer.echo(f"  {wave.name}: {len(wave.hosts)} hosts{soak}: {', '.join(wave.hosts[:8])}"
                   + (" …" if len(wave.hosts) > 8 else ""))  # fmt: skip
    if found.policy is not None:
        typer.echo(f"  {found.policy.words()}")
    typer.echo(f"  at most {at_once} in flight; a silent host fails after {command.host_deadline_s:g} s")
    approval = (
        "is regulated: another operator has to approve it"
        if second
        else "is not regulated: one signature is enough"
    )
    typer.echo(f"  {command.workspace} {approval}")
    for line in rolloutview.exposed(found_exposure):
        typer.echo(line)
    typer.echo(f"next: loopback rollout start {file} --watch", err=True)


@app.command("start")
def start(
    file: File,
    watch: Annotated[bool, typer.Option("--watch", help="Stay and show progress until it ends.")] = False,
    policy_serial: Serial = None,
    json: fleetio.Json = False,
) -> None:
    """Sign a rollout and its policy, store the policy, and start it."""
    read = rolloutfile.load(file)

    async def run() -> int:
        async with context.connect() as session:
            found = await prepare(session, read, policy_serial)
            if found.policy is not None:
                await policyfile.store(session, found.policy)
            try:
                result = await session.send(found.command, "activation")
            except Refused as refused:
                raise Refused(refused.code, read.place(refused.reason), refused.next_step) from None
            if json and not watch:
                fleetio.print_json(
                    {
                        "rollout": read.rollout,
                        "workspace": read.workspace,
                        "policy": found.policy.plain() if found.policy else None,
                        "detail": result.detail,
                    }
                )
            if not watch:
                typer.echo(
                    f"rollout {read.rollout} is created for {result.detail.get('hosts')} hosts", err=True
                )
                if result.detail.get("approvals_needed"):
                    typer.echo("it waits for another operator's approval", err=True)
                    typer.echo(
                        f"next: loopback rollout approve {read.rollout} --workspace {read.workspace}",
                        err=True,
                    )
                else:
                    typer.echo(
                        f"next: loopback rollout watch {read.rollout} --workspace {read.workspace}", err=True
                    )
                return 0
            return await _watch(session, read.workspace, read.rollout, json)

    raise typer.Exit(asyncio.run(run()))


# Steering


def _steer(command: type[RolloutPause | RolloutResume | RolloutAbort], rollout: str, workspace: str | None,
           reason: str, said: str, json: bool) -> None:  # fmt: skip
    async def run() -> str:
        async with context.connect() as session:
            place = await fleetio.only_workspace(session, workspace)
            fields = context.new_command_fields(place)
            await session.send(command(**fields, rollout=rollout, reason=reason), "activation")
            return place

    place = asyncio.run(run())
    if json:
        fleetio.print_json({"rollout": rollout, "workspace": place, "accepted": said})
    typer.echo(f"rollout {rollout} {said}", err=True)
    typer.echo(f"next: loopback rollout watch {rollout} --workspace {place}", err=True)


@app.command("approve")
def approve(
    rollout: Id,
    workspace: In = None,
    reason: Why = "",
    yes: Annotated[bool, typer.Option("--yes", help="Sign without asking.")] = False,
    diff: Annotated[bool, typer.Option("--diff", help="Show every line of the policy that changes.")] = False,
    json: fleetio.Json = False,
) -> None:
    """Give a rollout that somebody else started the second signature; shows first what is signed.

    Everything shown was verified here, against the trust document: nothing of it is activation's word. Exit codes: 0 approved ·
    1 you said no · 2 refused.
    """

    async def run() -> bool:
        async with context.connect() as session:
            place = await fleetio.only_workspace(session, workspace)
            state = await folded(session, place)
            found = await rolloutapprove.review(session, state, find(state, rollout))
            typer.echo(rolloutapprove.words(found, whole_diff=diff), err=json)
            command = rolloutapprove.command(found, context.new_command_fields(place), reason)
            if not yes and not _confirmed(rollout):
                return False
            await session.send(command, "activation")
            if json:
                fleetio.print_json(rolloutapprove.plain(found) | {"approved": True})
            typer.echo(f"rollout {rollout} is approved", err=True)
            typer.echo(f"next: loopback rollout watch {rollout} --workspace {place}", err=True)
            return True

    if not asyncio.run(run()):
        typer.echo("nothing was signed", err=True)
        raise typer.Exit(1)


def _confirmed(rollout: str) -> bool:
    if not sys.stdin.isatty():
        raise Refused(
            Code.COMMAND_UNAUTHORISED,
            "nobody is there to confirm it: this is no terminal",
            f"read what it says, then 'loopback rollout approve {rollout} --yes'",
        )
    with keyring.answering():
        return typer.confirm("sign this?", err=True)


@app.command("pause")
def pause(rollout: Id, workspace: In = None, reason: Why = "", json: fleetio.Json = False) -> None:
    """Take no new hosts; those in flight finish."""
    _steer(RolloutPause, rollout, workspace, reason, "is paused", json)


@app.command("resume")
def resume(rollout: Id, workspace: In = None, reason: Why = "", json: fleetio.Json = False) -> None:
    """Go on; hosts that were inconclusive are asked again."""
    _steer(RolloutResume, rollout, workspace, reason, "goes on", json)


@app.command("abort")
def abort(rollout: Id, workspace: In = None, reason: Why = "", json: fleetio.Json = False) -> None:
    """End it and take the updated hosts back to what they came from."""
    _steer(RolloutAbort, rollout, workspace, reason, "is aborted; its hosts return", json)


# Looking


@app.command("list")
def list_rollouts(workspace: In = None, json: fleetio.Json = False) -> None:
    """Every rollout, oldest first."""

    async def run() -> list[Rollout]:
        async with context.connect() as session:
            place = await fleetio.any_workspace(session, workspace)
            found = await fleetio.records(session, "workspace", WorkspacePut, place)
            places = [w.workspace for w in found]
            return [r for place in places for r in (await folded(session, place)).rollouts.values()]

    found = [rolloutview.summary(r) for r in sorted(asyncio.run(run()), key=lambda r: r.created_at)]
    if json:
        fleetio.print_json(found)
        return
    fleetio.table(
        ("ROLLOUT", "WORKSPACE", "MODULE", "VERSION", "STATE", "HOSTS", "PROMOTED", "FAILED", "CREATED", "BY", "APPROVED"),
        [
            (r["rollout"], r["workspace"], r["module"], r["version"], r["state"], str(r["hosts"]), str(r["promoted"]),
             str(r["failed"]), f"{r['created_at']:%Y-%m-%d %H:%M:%S}", ",".join(r["started_by"]), ",".join(r["approved_by"]))
            for r in found
        ],
    )  # fmt: skip


@app.command("show")
def show(rollout: Id, workspace: In = None, json: fleetio.Json = False) -> None:
    """One rollout: its waves, its hosts, why it is where it is."""

    async def run() -> Rollout:
        async with context.connect() as session:
            place = await fleetio.only_workspace(session, workspace)
            return find(await folded(session, place), rollout)

    found = asyncio.run(run())
    if json:
        fleetio.print_json(rolloutview.full(found))
    else:
        typer.echo(rolloutview.words(found))


@app.command("watch")
def watch(rollout: Id, workspace: In = None, json: fleetio.Json = False) -> None:
    """Follow a rollout until it ends or needs a person. Exit codes: see 'loopback rollout --help'."""

    async def run() -> int:
        async with context.connect() as session:
            place = await fleetio.only_workspace(session, workspace)
            find(await folded(session, place), rollout)
            return await _watch(session, place, rollout, json)

    raise typer.Exit(asyncio.run(run()))


def _over(rollout: Rollout | None) -> bool:
    """Whether nothing more happens without a person."""
    if rollout is None:
        return False
    if rollout.state is State.HALTED:
        # After a failed wave the way back follows in the same decision, unless the operator said to halt.
        failed = any(wave.state is WaveState.FAILED for wave in rollout.waves)
        return rollout.start.scope.on_failure == "halt" or not failed
    if rollout.state is State.AWAITING_APPROVAL:
        return rollout.judged or rollout.start.scope.absent  # a verdict may still end it
    return rollout.state in FINAL or rollout.state is State.PAUSED or bool(rollout.broken)


async def _watch(session: context.Session, workspace: str, name: str, json: bool) -> int:
    """Show each event as it comes; on a terminal, a table that redraws itself. Returns the exit code."""
    state = Workspace(workspace)
    stream = subjects.workspace_stream(workspace)
    filters = [subjects.rollout(workspace, name, "*")]
    end = max((m.sequence for m in await session.read(stream, filters)), default=0)
    terminal = sys.stdout.isatty() and not json
    screen: Any = (
        Live(console=Console(), refresh_per_second=4, transient=False) if terminal else nullcontext()
    )
    recent: list[str] = []
    shown: rolloutview.Shown = {}
    # Closed here, before the connection is: a generator that is merely dropped would try to unsubscribe later.
    async with aclosing(session.follow(stream, filters)) as messages:
        with screen as display:
            async for message in messages:
                link = fold(state, message.data)
                rollout = state.rollouts.get(name)
                if rollout is None:
                    continue
                if link is not None and json:
                    typer.echo(msgspec.json.encode(link).decode())
                elif link is not None and (said := rolloutview.line(rollout, link, shown)):
                    recent.append(said)
                    if not terminal:
                        typer.echo(said)
                if display is not None:
                    display.update(rolloutview.live(rollout, recent, datetime.now(UTC)))
                if message.sequence >= end and _over(rollout):
                    break
    rollout = find(state, name)
    if rollout.state is not State.DONE:
        typer.echo(rolloutview.words(rollout), err=True)
    if rollout.state is State.PAUSED:
        typer.echo(f"next: loopback rollout resume {name}, or abort {name}", err=True)
    elif rollout.state is State.AWAITING_APPROVAL:
        typer.echo(f"next: {rolloutview.approve_next(rollout)} (another operator)", err=True)
    elif rollout.state is State.HALTED:
        typer.echo(f"next: loopback rollout abort {name} takes the updated hosts back", err=True)
    return EXIT_CODES.get(rollout.state, 4)
