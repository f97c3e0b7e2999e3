"""The streams and the bucket of an installation: made when missing, brought up to date when they differ.

`ensure` runs with the admin's identity when the bus is set up; `ensure_workspace` is what eligibility does for a new workspace.
"""

from __future__ import annotations

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
                "name": subjects.STREAM_REPORTS,
                "subjects": [f"lb.ws.*.from.*.{what}" for what in ("inventory", "status", "heartbeat")],
                "persist_mode": "async",
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


async def ensure(bus: Bus, *, replicas: int = 1) -> None:
    """Make or update every stream and the global workspace's. Raises Refused where the server is too old."""
    await require_api_level(bus)
    for configuration in (
        *configurations(replicas),
        workspace_configuration(subjects.GLOBAL_WORKSPACE, replicas),
    ):
        try:
            await bus.api(f"STREAM.CREATE.{configuration['name']}", configuration)
        except ApiError as error:
            if error.code != wire.STREAM_NAME_TAKEN:
                raise
            await bus.api(f"STREAM.UPDATE.{configuration['name']}", configuration)


async def ensure_workspace(bus: Bus, workspace: str, *, replicas: int | None = None) -> None:
    """Make a workspace's stream; one that exists is left as it is. It gets as many replicas as the commands' stream has.

    Raises Refused(NAME_INVALID) for a name that cannot be one.
    """
    if replicas is None:
        info = await bus.api(f"STREAM.INFO.{subjects.STREAM_COMMANDS}")
        replicas = int(info["config"].get("num_replicas", 1))
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
