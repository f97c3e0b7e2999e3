"""`loopback host` and `loopback hosts`: add hosts to the fleet, and see how they are."""

from __future__ import annotations

import asyncio
import importlib
import ipaddress
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import typer
import typer.core
import typer.main

from loopback.cli import context, creds, fleetio
from loopback.contracts import subjects, view
from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import SigningKey
from loopback.contracts.messages import HostPut, Offer
from loopback.contracts.reports import ModuleStatus
from loopback.contracts.view import HostView
from loopback.host import config

FILES: Final = ("host.creds", "root.json", "host.toml")


class _Host(typer.core.TyperGroup):
    """The group, with `run` brought in from the agent's side only when it is wanted."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted({*super().list_commands(ctx), "run"})

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
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
Workspace = Annotated[str | None, typer.Option("--workspace", help="The host's workspace.")]


def hosts_command(workspace: Workspace = None, json: fleetio.Json = False) -> None:
    """Every host: what it runs, whether it enforces, and when it was last heard of."""

    async def run() -> tuple[list[HostPut], dict[tuple[str, str], HostView]]:
        async with context.connect() as session:
            place = await fleetio.any_workspace(session, workspace)
            return await fleetio.records(session, "host", HostPut, place), await views(session, place)

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
        typer.echo("no host yet; add one with 'loopback host add'", err=True)


@app.command("show")
def show(
    host: Annotated[str, typer.Argument(help="The host.")],
    workspace: Workspace = None,
    json: fleetio.Json = False,
) -> None:
    """Everything that is known of one host: its record, what it said last, and what it may have."""

    async def run() -> tuple[HostPut, HostView | None, Offer | None]:
        async with context.connect() as session:
            record = await recorded(session, host, workspace)
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
    typer.echo("\n".join(details(record, found, offer, datetime.now(UTC))))


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
    interface: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Interface that the firewall protects. May be repeated."),
    ] = None,
    heartbeat: Annotated[float, typer.Option(help="Seconds between its heartbeats.")] = config.HEARTBEAT_S,
    replace: Annotated[
        bool, typer.Option("--replace", help="Give a known host a new key; its old one stops counting.")
    ] = False,
) -> None:
    """Make a host known: a key of its own, a signed record, and a folder to run its agent from."""

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
    check(host, workspace, addresses)
    pinned = session.context.home / "tuf" / "root.json"
    if not pinned.exists():
        raise Refused(
            Code.TUF_UNREACHABLE, f"there is no trust root {pinned}", "make it with 'loopback keys init'"
        )
    if not replace:
        if any(h.host == host for h in await fleetio.records(session, "host", HostPut, workspace)):
            raise Refused(
                Code.NAME_INVALID,
                f"{host!r} is already a host of {workspace!r}",
                "choose another name, or give it a new key with --replace",
            )
        if taken := [str(out / name) for name in FILES if (out / name).exists()]:
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
    _write_folder(
        out,
        text,
        pinned,
        config.HostConfig(
            host=host,
            workspace=workspace,
            url=url or session.context.url,
            creds=Path("host.creds"),
            root=Path("root.json"),
            state_dir=Path("state"),
            heartbeat_s=heartbeat_s,
            allow=config.Allow(modules=("firewall",), capabilities=config.CAPABILITIES),
            modules={"firewall": dict(firewall)} if firewall else {},
        ),
    )
    return out / "host.toml"


def _write_folder(out: Path, creds_text: str, root: Path, host: config.HostConfig) -> None:
    path = out / "host.creds"
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(creds_text)
    (out / "root.json").write_bytes(root.read_bytes())
    config.write_config(host, out / "host.toml")


@app.command("remove")
def remove(
    host: Annotated[str, typer.Argument(help="The host.")],
    workspace: Workspace = None,
) -> None:
    """Withdraw a host's record. Its reports stop counting; what it enforces goes on until its agent is removed."""

    async def run() -> None:
        async with context.connect() as session:
            record = await recorded(session, host, workspace)
            await session.send(
                HostPut(
                    **context.new_command_fields(record.workspace),
                    host=host,
                    public_key=record.public_key,
                    absent=True,
                ),
                "eligibility",
            )

    asyncio.run(run())
    typer.echo(f"{host} is no longer known", err=True)


def check(host: str, workspace: str, addresses: Sequence[str]) -> None:
    """Refuse names that a host's own configuration would refuse later. Raises Refused(NAME_INVALID)."""
    for what, name in (("host", host), ("workspace", workspace)):
        if not config.NAME.fullmatch(name):
            raise Refused(
                Code.NAME_INVALID,
                f"{what}: {name!r} must be lower-case letters, digits, dots, dashes and underscores",
                "choose a name such as web-1",
            )
    for address in addresses:
        try:
            ipaddress.ip_interface(address)
        except ValueError:
            raise Refused(
                Code.NAME_INVALID, f"--address {address!r} is no IP address", "write it like 192.0.2.7"
            ) from None


async def recorded(session: context.Session, host: str, workspace: str | None) -> HostPut:
    """A host's record. Raises Refused where there is none, or several and no workspace was named."""
    place = await fleetio.any_workspace(session, workspace)
    found = [h for h in await fleetio.records(session, "host", HostPut, place) if h.host == host]
    if not found:
        raise Refused(
            Code.ELIGIBILITY_NO_RECORD, f"no record names the host {host!r}", "see 'loopback hosts'"
        )
    if len(found) > 1:
        places = ", ".join(h.workspace for h in found)
        raise Refused(
            Code.WORKSPACE_UNKNOWN,
            f"the host {host!r} is in several workspaces: {places}",
            "name one with --workspace",
        )
    return found[0]


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
    """A host's state in a word."""
    return found.state if found else "never seen"


def module_text(module: ModuleStatus) -> str:
    """One module on one line: version, policy, whether it enforces, its health, and its phase while it is at work."""
    words = [module.module, module.promoted.version if module.promoted else "none"]
    if module.promoted and module.promoted.policy:
        words.append(f"policy #{module.promoted.policy_serial} {module.promoted.policy[:8]}")
    words.append("enforcing" if module.enforcing else "not enforcing")
    words.append(module.health)
    if module.phase not in ("idle", "promoted"):
        words.append(f"({module.phase})")
    return " ".join(words)


def ago(now: datetime, then: datetime) -> str:
    """How long ago, in the largest unit that says enough."""
    seconds = max((now - then).total_seconds(), 0.0)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def summary(record: HostPut, found: HostView | None) -> dict[str, Any]:
    """One host as `--json` shows it."""
    inventory = found.inventory if found else None
    return {
        "host": record.host,
        "workspace": record.workspace,
        "state": state(found),
        "labels": record.labels,
        "addresses": record.addresses,
        "agent": inventory.agent_version if inventory else None,
        "kernel": inventory.kernel if inventory else None,
        "architecture": inventory.architecture if inventory else None,
        "last_seen": found.last_at if found else None,
        "lost": found is not None and found.lost_at is not None,
        "modules": [msgspec.structs.asdict(module) for module in (found.modules if found else ())],
    }


def details(record: HostPut, found: HostView | None, offer: Offer | None, now: datetime) -> list[str]:
    """One host for people."""
    lines = [
        f"host       {record.host} in {record.workspace}",
        f"state      {state(found)}" + (f", last seen {ago(now, found.last_at)}" if found else ""),
        f"labels     {fleetio.label_text(record.labels)}",
        f"addresses  {', '.join(record.addresses) or '-'}",
        f"key        {record.public_key[:16]}…",
    ]
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
    for one in offer.versions if offer else ():
        word = "may have  " if one.refusal is None else "may not   "
        lines.append(f"{word} {one.module} {one.version}: {one.rule}")
    return lines
