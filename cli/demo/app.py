"""`loopback demo`: build the stage, play the story, clean up, write the summary."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final, NamedTuple

import msgspec
import typer

from loopback.bpf import kernel
from loopback.cli.demo import network
from loopback.cli.demo.show import Timeline
from loopback.cli.demo.stage import Stage
from loopback.cli.demo.story import HOSTS, Story
from loopback.cli.otlp_receiver import OtlpReceiver
from loopback.contracts.codes import Code, Refused

LOCK: Final = Path("/run/lock/loopback-demo.lock")
VANISH_S: Final = 15.0  # the kernel frees programs some time after the last reference to them is gone


@contextmanager
def _only_one() -> Iterator[None]:
    with LOCK.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused(
                Code.COMMAND_CONFLICT, "another demo is running on this machine", "wait until it has ended"
            ) from None
        yield


class _Before(NamedTuple):
    """What the kernel had of maps, programs and links: with their names, and only counted up."""

    objects: set[str]
    ids: set[tuple[str, int]]


async def _play(
    out: Path, show: Timeline, kernel_refuses: str, before: _Before
) -> tuple[Story, bool, set[str]]:
    """The story, whether it was played to its end, and the names of what it put into the kernel."""
    async with OtlpReceiver() as receiver:
        environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint,
            "OTEL_BSP_SCHEDULE_DELAY": "500",  # ms; a live demo wants its spans soon
            "OTEL_METRIC_EXPORT_INTERVAL": "5000",
            "COLUMNS": "120",
        }
        stage = Stage(out, show, HOSTS, environment)
        story = Story(stage, show, receiver, kernel_refuses)
        finished = False
        try:
            await story.play()
            finished = True
        except Refused as refused:
            show.bad(f"{refused.reason} [{refused.code}] {refused.next_step}")
        finally:
            made = {network.name_of(found) for found in network.kernel_objects() - before.objects}
            await stage.stop()
    return story, finished, made


def _residue(before: _Before, made: set[str], bpf: Path) -> list[str]:
    """What the demo left in the kernel, after giving it time to free what nobody refers to.

    Other software may load programs meanwhile, so only objects named as the demo's own were count. Names are asked for last:
    that opens each object, which one that is just going does not bear (see `kernel.object_ids`).
    """
    deadline = time.monotonic() + VANISH_S
    while True:
        left = [
            *network.namespaces(),
            *network.pins(bpf),
            *([f"mount {bpf}"] if os.path.ismount(bpf) else []),
        ]
        fresh = kernel.object_ids() - before.ids
        if not left and not fresh:
            return []
        if time.monotonic() > deadline:
            return [
                *left,
                *sorted(o for o in network.kernel_objects() - before.objects if network.name_of(o) in made),
            ]
        time.sleep(0.2)


def demo_command(
    out: Annotated[
        Path, typer.Option(help="Folder for everything the demo writes; it is emptied first.")
    ] = Path("build/demo"),
) -> None:
    """Play the whole product on this machine: four hosts, real packets, a real kernel. Needs root; about two minutes.

    Writes summary.json into the folder. Exit code 0 when everything held, 1 when something did not.
    """
    if os.geteuid() != 0:
        raise Refused(
            Code.COMMAND_UNAUTHORISED, "the demo makes network namespaces", "run it as root: 'sudo make demo'"
        )
    out = out.absolute()
    show = Timeline()
    with _only_one():
        network.remove()
        network.unmount_bpf(out / "bpf")
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        refuses = kernel.why_unsupported()
        before = _Before(network.kernel_objects(), kernel.object_ids())
        story: Story | None = None
        finished = False
        made: set[str] = set()
        try:
            network.build(HOSTS)
            network.mount_bpf(out / "bpf")
            # From here on this process lives in the control namespace, and so does all that it starts there.
            network.move_this_process(network.CONTROL)
            story, finished, made = asyncio.run(_play(out, show, refuses, before))
        finally:
            residue = _clean(before, made, out)
        assert story is not None  # an error above has left already
        summary = story.summary
        summary.residue = residue
        summary.duration_s = round(show.elapsed, 1)
        held = finished and not story.failures and not residue
        show.act("·", "The end")
        show.check(not residue, f"left behind in the kernel: {', '.join(residue) or 'nothing'}")
        (out / "summary.json").write_bytes(
            msgspec.json.format(msgspec.json.encode(summary), indent=2) + b"\n"
        )
        show.line(
            "·",
            "dim",
            f"{summary.duration_s} s; the figures are in {_shown(out / 'summary.json')}, logs beside it",
        )
    sys.exit(0 if held else 1)


def _clean(before: _Before, made: set[str], out: Path) -> list[str]:
    network.remove()
    network.unmount_bpf(out / "bpf")
    return _residue(before, made, out / "bpf")


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
