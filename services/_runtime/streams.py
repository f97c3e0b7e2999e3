"""The streams and the bucket of an installation: made when missing, brought up to date when they differ.

`ensure` runs with the admin's identity when the bus is set up; services wait for that in `present`; `ensure_workspace` is what
eligibility does for a new workspace.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, Final

from loopback.contracts import subjects
from loopback.contracts.codes import Code, Refused
from loopback.services._runtime import wire
from loopback.services._runtime.bus import Bus, require_api_level
from loopback.services._runtime.wire import ApiError

_SECOND: Final = 10**9
_DAY: Final = 24 * 3600 * _SECOND
_MIB: Final = 1024 * 1024

#: Commands outlive their own validity (a day) many times over, so that a replay is recognised from what is stored.
COMMANDS_KEPT: Final = 30 * _DAY
REPORTS_KEPT: Final = 7 * _DAY
OTLP_KEPT: Final = 3600 * _SECOND
#: Room for a host's inventory, status and heartbeat each; what is older than the last ones says nothing more.
REPORTS_PER_SUBJECT: Final = 64

LOOK_S: Final = 0.5  # how soon a service that waits for streams looks again at first
LONGEST_LOOK_S: Final = 10.0  # and later on
REMIND_S: Final = 300.0  # how often it says again that it waits

_WORKSPACES: Final = subjects.workspace_stream("x").removesuffix("x")

log = logging.getLogger(__name__)

_BASE: Final[dict[str, Any]] = {
    "retention": "limits",
    "storage": "file",
    "discard": "old",
    "allow_direct": True,
    "duplicate_window": 120 * _SECOND,
}


def configurations(replicas: int = 1) -> list[dict[str, Any]]:
    """Every stream but the workspaces'. `replicas`: on how many servers each is kept."""
    return [
        {**_BASE, "num_replicas": replicas, **stream}
        for stream in (
            {
                "name": subjects.STREAM_COMMANDS,
                "subjects": ["lb.ws.*.cmd.>"],
                "max_age": COMMANDS_KEPT,
                "max_msg_size": _MIB,
            },
            {
                "name": subjects.STREAM_FLEET,
                "subjects": [
                    "lb.ws.*.record.>",
                    "lb.ws.*.offer.*",
                    "lb.ws.*.verdict.>",
                    "lb.ws.*.presence.*",
                ],
                "allow_atomic": True,
            },
            {
                "name": subjects.STREAM_ROSTERS,
                "subjects": ["lb.ws.*.roster.*", "lb.ws.*.slice.*.*"],
                "max_msgs_per_subject": 1,
                "allow_atomic": True,
                "republish": {
                    "src": "lb.ws.*.roster.*",
                    "dest": "lb.ws.{{wildcard(1)}}.rosters.{{wildcard(2)}}",
                },
            },
            {
                "name": subjects.STREAM_REPORTS,
                "subjects": [f"lb.ws.*.from.*.{what}" for what in ("inventory", "status", "heartbeat")],
                # Reports come again anyway; but the server takes this on one server only.
                **({"persist_mode": "async"} if replicas == 1 else {}),
                "max_age": REPORTS_KEPT,
                "max_msgs_per_subject": REPORTS_PER_SUBJECT,
            },
            {
                "name": subjects.STREAM_OTLP,
                "subjects": ["lb.ws.*.from.*.otlp"],
                "storage": "memory",
                "max_age": OTLP_KEPT,
                "max_bytes": 256 * _MIB,
            },
            {"name": subjects.STREAM_CATALOG, "subjects": ["lb.catalog.>"], "allow_atomic": True},
            {
                "name": subjects.STREAM_BLOBS,
                "subjects": ["lb.blob.>"],
                "max_msgs_per_subject": 1,
                "discard": "new",
                "discard_new_per_subject": True,
            },
            {
                "name": subjects.STREAM_TUF,
                "subjects": ["lb.tuf.>"],
                "max_msgs_per_subject": 1,
                "allow_atomic": True,
            },
            {
                "name": f"KV_{subjects.BUCKET_VIEW}",
                "subjects": [f"$KV.{subjects.BUCKET_VIEW}.>"],
                "max_msgs_per_subject": 1,
                "discard": "new",
                "allow_rollup_hdrs": True,
                "deny_delete": True,
            },
        )
    ]


def workspace_configuration(workspace: str, replicas: int = 1) -> dict[str, Any]:
    """A workspace's decision stream: atomic, and a desired state reaches its host only once it is stored."""
    prefix = f"lb.ws.{subjects.token(workspace)}"
    return {
        **_BASE,
        "num_replicas": replicas,
        "name": subjects.workspace_stream(workspace),
        "subjects": [
            f"{prefix}.result.*",
            f"{prefix}.journal.>",
            f"{prefix}.rollout.>",
            f"{prefix}.desired.*",
        ],
        "allow_atomic": True,
        "deny_delete": True,
        "republish": {"src": f"{prefix}.desired.*", "dest": f"{prefix}.to.{{{{wildcard(1)}}}}.desired"},
    }


def _all(replicas: int) -> list[dict[str, Any]]:
    return [*configurations(replicas), workspace_configuration(subjects.GLOBAL_WORKSPACE, replicas)]


async def ensure(bus: Bus, *, replicas: int = 1) -> None:
    """Make or update every stream and the global workspace's.

    Raises Refused where the server is too old, where there are fewer servers than `replicas`, and where a stream of reports
    that was made for one server should be kept on more: how it is written cannot change.
    """
    await require_api_level(bus)
    for configuration in _all(replicas):
        try:
            await _make(bus, configuration)
        except ApiError as error:
            if error.code not in (wire.REPLICAS_UNSUPPORTED, wire.NO_PEERS):
                raise
            raise Refused(
                Code.CONFIG_INVALID,
                f"{replicas} copies of {configuration['name']} need as many servers in one cluster: {error}",
                "give --replicas 1 for a single server, or wait until the cluster is whole",
            ) from None


async def _make(bus: Bus, configuration: dict[str, Any]) -> None:
    try:
        await bus.api(f"STREAM.CREATE.{configuration['name']}", configuration)
    except ApiError as error:
        if error.code != wire.STREAM_NAME_TAKEN:
            raise
        # How a stream is written can never change, and with "async" it is kept on one server for good.
        now = (await bus.api(f"STREAM.INFO.{configuration['name']}"))["config"]
        kept = {"persist_mode": now["persist_mode"]} if "persist_mode" in now else {}
        if kept.get("persist_mode") == "async" and configuration["num_replicas"] > 1:
            raise Refused(
                Code.CONFIG_INVALID,
                f"{configuration['name']} was made for one server and cannot be kept on {configuration['num_replicas']}",
                "delete that stream with NATS's own tools (hosts report again), then repeat",
            ) from None
        plain = {key: value for key, value in configuration.items() if key != "persist_mode"}
        await bus.api(f"STREAM.UPDATE.{configuration['name']}", plain | kept)


async def names(bus: Bus, subject: str = "") -> list[str]:
    """Every stream, or every one with subjects like this one, page by page."""
    found: list[str] = []
    while True:
        page = await bus.api("STREAM.NAMES", {"subject": subject, "offset": len(found)})
        new = page.get("streams") or []
        found += new
        if not new or len(found) >= page["total"]:
            return found


async def spread(bus: Bus, replicas: int) -> None:
    """Keep the streams of all workspaces on this many servers too. With the admin's identity, after `ensure`."""
    for name in await names(bus):
        config = (await bus.api(f"STREAM.INFO.{name}"))["config"]
        if name.startswith(_WORKSPACES) and config["num_replicas"] != replicas:
            await bus.api(f"STREAM.UPDATE.{name}", {**config, "num_replicas": replicas})


async def replicas_of(bus: Bus) -> int:
    """On how many servers the streams are kept; 1 where there are none yet."""
    try:
        info = await bus.api(f"STREAM.INFO.{subjects.STREAM_COMMANDS}")
    except ApiError as error:
        if error.code == wire.NO_STREAM:
            return 1
        raise
    return int(info["config"].get("num_replicas", 1))


async def missing(bus: Bus) -> list[str]:
    """Which of the streams that `ensure` makes are not there."""
    absent = []
    for configuration in _all(1):
        # Asked by subject: among thousands of workspaces a list of names would have pages.
        found = await bus.api("STREAM.NAMES", {"subject": configuration["subjects"][0]})
        if configuration["name"] not in (found.get("streams") or ()):
            absent.append(str(configuration["name"]))
    return absent


async def present(bus: Bus, waiting: asyncio.Event) -> None:
    """Wait until every stream is there, saying once, and again every REMIND_S seconds, what is waited for.

    `waiting` is set meanwhile.
    """
    pause, said = LOOK_S, float("-inf")
    while absent := await missing(bus):
        waiting.set()
        if time.monotonic() - said > REMIND_S:
            said = time.monotonic()
            log.warning(
                "%s waits: the broker has no stream %s; next: run 'loopback bus init' where the admin's credentials are",
                bus.name,
                ", ".join(absent),
            )
        await asyncio.sleep(pause)
        pause = min(pause * 2, LONGEST_LOOK_S)
    if waiting.is_set():
        waiting.clear()
        log.info("%s goes on: the streams are there", bus.name)


async def ensure_workspace(bus: Bus, workspace: str, *, replicas: int | None = None) -> None:
    """Make a workspace's stream; one that exists is left as it is. It gets as many replicas as the commands' stream has.

    Raises Refused(NAME_INVALID) for a name that cannot be one.
    """
    if replicas is None:
        replicas = await replicas_of(bus)
    configuration = workspace_configuration(workspace, replicas)
    try:
        await bus.api(f"STREAM.CREATE.{configuration['name']}", configuration)
    except ApiError as error:
        if error.code == wire.STREAM_NAME_TAKEN:
            return
        if error.code == wire.STREAM_OVERLAP:
            raise Refused(
                Code.NAME_INVALID, f"the workspace {workspace!r} overlaps with another stream: {error}"
            ) from None
        raise
