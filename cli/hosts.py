"""`loopback host` and `loopback hosts`: add hosts to the fleet, and see how they are."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
import typer.core
import typer.main

from loopback.cli import context, creds, fleetio, hostchange, hostfolder, hostmove, hostrevoke, printing
from loopback.cli import enrol as enrolment
from loopback.contracts import subjects, view
from loopback.contracts.codes import Code, Refused
from loopback.contracts.hostrecord import HostRecord
from loopback.contracts.keys import PublicKey, SigningKey
from loopback.contracts.messages import HostPut, Offer
from loopback.contracts.reports import ModuleStatus
from loopback.contracts.view import HostView
from loopback.host import config


class _Host(typer.core.TyperGroup):
    """The group, with `run` and `ctl` brought in from the agent's side only when they are wanted."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted({*super().list_commands(ctx), "run", "ctl"})

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name == "ctl":
            return typer.main.get_command(importlib.import_module("loopback.cli.hostctl").app)
        if cmd_name != "run":
            return super().get_command(ctx, cmd_name)
        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        single.command("run")(importlib.import_module("loopback.cli.host_run").host_run_command)
        return typer.main.get_command(single)


app = typer.Typer(
    cls=_Host,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Hosts: add them, run their agent, look at one.",
)
for _name, _command in (
    ("invite", enrolment.invite_command),
    ("invites", enrolment.invites_command),
    ("enroll", enrolment.enroll_command),
    ("change", hostchange.change_command),
    ("move", hostmove.move_command),
    ("revoke", hostrevoke.revoke_command),
):
    app.command(_name, help=fleetio.taught(_command))(_command)
for _name, _command in (("enrol", enrolment.enroll_command), ("remove", hostrevoke.revoke_command)):
    app.command(_name, help=fleetio.taught(_command), hidden=True)(_command)
Workspace = Annotated[str | None, typer.Option("--workspace", help="The host's workspace.")]


def hosts_command(workspace: Workspace = None, json: fleetio.Json = False) -> None:
    """Every host: what it runs, whether it enforces, and when it was last heard of."""

    async def run() -> tuple[list[HostRecord], dict[tuple[str, str], HostView]]:
        async with context.connect() as session:
            place = await fleetio.any_workspace(session, workspace)
            return await fleetio.hosts(session, place), await views(session, place)

    records, seen = asyncio.run(run())
    rows = [(record, seen.get((record.workspace, record.host))) for record in records]
    if json:
        fleetio.print_json([summary(record, found) for record, found in rows])
        return
    now = datetime.now(UTC)
    fleetio.table(
        ("HOST", "WORKSPACE", "STATE", "AGENT", "MODULES", "KERNEL", "LAST SEEN"),
        [
            (
                record.host,
                record.workspace,
                state(found),
                found.inventory.agent_version if found and found.inventory else "-",
                "; ".join(module_text(m) for m in found.modules) if found else "-",
                found.inventory.kernel if found and found.inventory else "-",
                ago(now, found.last_at) if found else "never",
            )
            for record, found in rows
        ],
    )
    if not rows:
        typer.echo("no host yet; invite one with 'loopback host invite'", err=True)


@app.command("show")
def show(
    host: Annotated[str, typer.Argument(help="The host.")],
    workspace: Workspace = None,
    json: fleetio.Json = False,
) -> None:
    """Everything that is known of one host: its record, what it said last, and what it may have."""

    async def run() -> tuple[HostRecord, HostView | None, Offer | None]:
        async with context.connect() as session:
            record = await fleetio.recorded(session, host, workspace)
            found = await session.last(view.STREAM, view.subject(record.workspace, host))
            offer = await session.last(subjects.STREAM_FLEET, subjects.offer(record.workspace, host))
            return (
                record,
                view.decode(found) if found else None,
                msgspec.json.decode(offer, type=Offer) if offer else None,
            )

    record, found, offer = asyncio.run(run())
    if json:
        fleetio.print_json({**summary(record, found), "view": found, "offer": offer})
        return
    typer.echo("\n".join(map(printing.printable, details(record, found, offer, datetime.now(UTC)))))


@app.command("add")
def add(
    host: Annotated[str, typer.Argument(help="The host's name.")],
    out: Annotated[Path, typer.Option(help="Folder to write its credentials and host.toml to.")],
    workspace: Workspace = None,
    label: fleetio.Labels = None,
    address: Annotated[
        list[str] | None, typer.Option(metavar="IP", help="One of its addresses. May be repeated.")
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="Where the host finds the bus, if not where this command does.")
    ] = None,
    interface: fleetio.Interfaces = None,
    heartbeat: fleetio.Heartbeat = config.HEARTBEAT_S,
    replace: Annotated[
        bool, typer.Option("--replace", help="Give a known host a new key; its old one stops counting.")
    ] = False,
) -> None:
    """Make a host known: a key of its own, a signed record, and a folder to run its agent from.

    The simple way, for labs: the key is made here and copied to the host with the folder. 'loopback host invite' is the
    better one, with which the key is made on the host and never leaves it.

      loopback host add web-1 --workspace lab --label role=web --out web-1
    """

    async def run() -> Path:
        async with context.connect() as session:
            return await enrol(
                session,
                host=host,
                workspace=await fleetio.only_workspace(session, workspace),
                labels=fleetio.labels(label),
                addresses=address or (),
                out=out,
                url=url,
                heartbeat_s=heartbeat,
                firewall={"interfaces": list(interface)} if interface else {},
                replace=replace,
            )

    path = asyncio.run(run())
    typer.echo(
        f"{host} is known; copy {out} to it and run 'loopback host run --config {path.name}' in it there",
        err=True,
    )
    typer.echo(path)


async def enrol(
    session: context.Session,
    *,
    host: str,
    workspace: str,
    labels: Mapping[str, str],
    addresses: Sequence[str],
    out: Path,
    url: str | None = None,
    heartbeat_s: float = config.HEARTBEAT_S,
    firewall: Mapping[str, config.Setting] | None = None,
    replace: bool = False,
) -> Path:
    """Make a host known and write its folder; returns the path of its `host.toml`.

    The record is accepted before anything is written, so a refusal leaves no file behind. Raises Refused, and OSError
    where the folder cannot be made.
    """
    hostfolder.check(host, workspace, addresses)
    pinned = hostfolder.pinned_root(session.context.home)
    before = [h for h in await fleetio.hosts(session, workspace) if h.host == host]
    if not replace:
        if before:
            raise Refused(
                Code.NAME_INVALID,
                f"{host!r} is already a host of {workspace!r}",
                "choose another name, or give it a new key with --replace",
            )
        if taken := [str(out / name) for name in hostfolder.FILES if (out / name).exists()]:
            raise Refused(
                Code.NAME_INVALID,
                f"{taken[0]} exists",
                "choose another folder, or overwrite it with --replace",
            )
    # Before the record: a key that can be kept nowhere must not be recorded.
    await asyncio.to_thread(out.mkdir, parents=True, exist_ok=True)
    text = creds.host_creds(session.context.home, workspace, host)
    seed = next(line for line in text.splitlines() if line.startswith("SU"))
    await session.send(
        HostPut(
            **context.new_command_fields(workspace),
            host=host,
            public_key=SigningKey.from_nkey(seed).public.text,
            labels=dict(labels),
            addresses=tuple(addresses),
        ),
        "eligibility",
    )
    await hostrevoke.cut_off(session, [PublicKey.parse(h.public_key) for h in before])
    ca = session.context.ca
    made = hostfolder.new_config(
        host,
        workspace,
        url or session.context.url,
        firewall or {},
        heartbeat_s,
        Path("ca.pem") if ca else None,
    )
    await asyncio.to_thread(_write_folder, out, text, pinned, ca, made)
    return out / "host.toml"


def _write_folder(out: Path, creds_text: str, root: bytes, ca: Path | None, made: config.HostConfig) -> None:
    hostfolder.write(out / "host.creds", creds_text.encode())
    hostfolder.write(out / "root.json", root)
    if ca is not None:
        hostfolder.write(out / "ca.pem", ca.read_bytes())
    hostfolder.write_config(made, out / "host.toml")


async def views(session: context.Session, workspace: str = "*") -> dict[tuple[str, str], HostView]:
    """Telemetry's view of every host that was ever heard of."""
    place = workspace if workspace == "*" else subjects.token(workspace)
    found: dict[tuple[str, str], HostView] = {}
    for message in await session.read(view.STREAM, [f"$KV.{subjects.BUCKET_VIEW}.{place}.*"], last=True):
        if message.data:  # a purged key has none
            one = view.decode(message.data)
            found[one.workspace, one.host] = one
    return found


def state(found: HostView | None) -> str:
    """A host's state in a word, or two."""
    if found is None:
        return "never seen"
    return f"{found.state}, cloned" if found.cloned else found.state


def module_text(module: ModuleStatus) -> str:
    """One module on one line: version, policy, whether it enforces, its health, its phase while it is at work,
    and whether it is what the rules ask for.
    """
    words = [module.module, module.promoted.version if module.promoted else "none"]
    if module.promoted and module.promoted.policy:
        words.append(f"policy #{module.promoted.policy_serial} {module.promoted.policy[:8]}")
    words.append("enforcing" if module.enforcing else "not enforcing")
    words.append(module.health)
    if module.phase not in ("idle", "promoted"):
        words.append(f"({module.phase})")
    if module.noncompliant:
        words.append("NONCOMPLIANT")
    return " ".join(words)


def ago(now: datetime, then: datetime) -> str:
    """How long ago, in the largest unit that says enough."""
    seconds = max((now - then).total_seconds(), 0.0)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def summary(record: HostRecord, found: HostView | None) -> dict[str, Any]:
    """One host as `--json` shows it."""
    inventory = found.inventory if found else None
    return {
        "host": record.host,
        "workspace": record.workspace,
        "state": found.state if found else "never seen",
        "labels": record.labels,
        "addresses": record.addresses,
        "agent": inventory.agent_version if inventory else None,
        "kernel": inventory.kernel if inventory else None,
        "architecture": inventory.architecture if inventory else None,
        "last_seen": found.last_at if found else None,
        "cloned": found is not None and found.cloned,
        "lost": found is not None and found.lost_at is not None,
        "modules": [msgspec.structs.asdict(module) for module in (found.modules if found else ())],
    }


def details(record: HostRecord, found: HostView | None, offer: Offer | None, now: datetime) -> list[str]:
    """One host for people."""
    lines = [
        f"host       {record.host} in {record.workspace}",
        f"state      {state(found)}" + (f", last seen {ago(now, found.last_at)}" if found else ""),
        f"labels     {fleetio.label_text(record.labels)}",
        f"addresses  {', '.join(record.addresses) or '-'}",
        f"key        {record.public_key[:16]}…",
    ]
    if found and found.cloned:
        lines.append(
            f"cloned     two machines speak under this key  [{Code.HOST_CLONED}]; revoke it and enrol both anew"
        )
    if found and found.inventory:
        inventory = found.inventory
        lines += [
            f"agent      {inventory.agent_version}, ABI {inventory.abi_min}–{inventory.abi_max}",
            f"kernel     {inventory.kernel} {inventory.architecture}; {', '.join(inventory.features) or 'no features'}",
        ]
    if found and found.status and found.status.refusal:
        lines.append(f"refuses    {found.status.refusal.reason}  [{found.status.refusal.code}]")
    for module in found.modules if found else ():
        lines.append(f"runs       {module_text(module)}")
        if module.refusal:
            lines.append(f"           {module.refusal.reason}  [{module.refusal.code}]")
        if module.noncompliant:
            lines.append(f"           {module.noncompliant.reason}  [{module.noncompliant.code}]")
    for one in offer.versions if offer else ():
        word = "may have  " if one.refusal is None else "may not   "
        lines.append(f"{word} {one.module} {one.version}: {one.rule}")
    return lines
