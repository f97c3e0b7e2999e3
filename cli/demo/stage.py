"""What the acts stand on: processes started in namespaces, commands of the operator, traffic, and the end of it all."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tomllib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from loopback.cli.demo import network
from loopback.cli.demo.show import Timeline
from loopback.contracts.codes import Code, Refused

WAIT_S: Final = 60.0
POLL_S: Final = 0.1
STOP_S: Final = 15.0


class Stage:
    """Everything the demo started, so that it can be ended by its own process id."""

    def __init__(
        self, out: Path, show: Timeline, hosts: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        self.out = out
        self.home = out / "home"
        self.bpf = out / "bpf"
        self.show = show
        self.names = list(hosts)
        self.environment = {**os.environ, **environment, "LOOPBACK_HOME": str(self.home)}
        self.processes: dict[str, asyncio.subprocess.Process] = {}
        self.logs = out / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)

    async def spawn(
        self, name: str, words: Sequence[str], namespace: str, *, talk: bool = False
    ) -> asyncio.subprocess.Process:
        """Start a process in a namespace; with `talk` its standard input and output are pipes, otherwise a log file."""
        command = [*network.enter(namespace), *words]
        with (self.logs / f"{name}.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE if talk else asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE if talk else log,
                stderr=log,
                env=self.environment,
                start_new_session=True,
            )
        self.processes[name] = process
        return process

    async def loopback(
        self, *words: str, quiet: bool = False, check: bool = True, live: bool = False, namespace: str = ""
    ) -> tuple[int, str]:
        """Run the operator's command as a person would; returns exit code and standard output.

        With `live`, its lines are shown as they come; with `namespace`, it runs there.
        Raises Refused with what it said on standard error when `check` and it failed.
        """
        if not quiet:
            self.show.command("loopback " + " ".join(words))
        process = await asyncio.create_subprocess_exec(
            *(network.enter(namespace) if namespace else ()),
            *(sys.executable, "-m", "loopback.cli.main", *words),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self.environment,
        )
        assert process.stdout is not None and process.stderr is not None  # pipes, as asked for
        errors = asyncio.create_task(process.stderr.read())
        out = b""
        while line := await process.stdout.readline():
            out += line
            if live:
                self.show.output(line.decode())
        err = await errors
        code = await process.wait()
        if check and code:
            raise Refused(
                Code.COMMAND_CONFLICT,
                f"'loopback {' '.join(words)}' ended with {code}: {err.decode().strip()}",
                f"see the logs in {self.logs}",
            )
        return code, out.decode()

    async def json(self, *words: str) -> Any:
        """The same, for its `--json`."""
        _, out = await self.loopback(*words, "--json", quiet=True)
        return json.loads(out)

    async def start_host(self, name: str) -> None:
        """Start a host's agent in its namespace."""
        config = self.out / "hosts" / name / "host.toml"
        await self.spawn(
            f"agent-{name}",
            [sys.executable, "-m", "loopback.cli.main", "host", "run", "--config", str(config)],
            network.host_namespace(name),
        )

    async def until(
        self, what: str, check: Callable[[], Awaitable[Any]], timeout: float = WAIT_S, poll: float = POLL_S
    ) -> Any:
        """Await the first true answer. Raises Refused naming `what` after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                while not (answer := await check()):
                    dead = [
                        n for n, p in self.processes.items() if p.returncode not in (None, -signal.SIGKILL)
                    ]
                    if dead:
                        raise Refused(
                            Code.MODULE_DIED, f"{dead[0]} ended by itself", f"see {self.logs}/{dead[0]}.log"
                        )
                    await asyncio.sleep(poll)
                return answer
        except TimeoutError:
            raise Refused(
                Code.MODULE_TIMEOUT,
                f"waited {timeout:.0f} s in vain for: {what}",
                f"see the logs in {self.logs}",
            ) from None

    async def kill_group(self, name: str) -> None:
        """SIGKILL a process and wait until it is gone."""
        process = self.processes.pop(name)
        process.kill()
        await process.wait()

    async def stop(self) -> None:
        """End everything that was started, the last first, politely and then not."""
        for name, process in reversed(list(self.processes.items())):
            if process.stdin is not None:
                process.stdin.close()
            elif process.returncode is None:
                process.terminate()
            try:
                await asyncio.wait_for(process.wait(), STOP_S)
            except TimeoutError:
                self.show.say(f"{name} did not end within {STOP_S:.0f} s and was killed")
                process.kill()
                await process.wait()
        self.processes.clear()


class Talker:
    """One traffic process, spoken to in JSON lines."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lock = asyncio.Lock()

    async def ask(self, order: Mapping[str, Any] | None = None) -> Any:
        """Send an order (None: only wait for the greeting) and return the answer."""
        assert self.process.stdin is not None and self.process.stdout is not None  # started with talk=True
        async with self.lock:
            if order is not None:
                self.process.stdin.write(json.dumps(order).encode() + b"\n")
                await self.process.stdin.drain()
            line = await self.process.stdout.readline()
        if not line:
            raise Refused(Code.MODULE_DIED, "a traffic process ended by itself", "see its log")
        return json.loads(line)


def children_of(pid: int) -> list[int]:
    """Process ids of the direct and indirect children of a process."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found: list[int] = []
    queue = [pid]
    while queue:
        for child in parents.get(queue.pop(), []):
            found.append(child)
            queue.append(child)
    return found


def edit_toml(path: Path, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Add module settings to a host.toml that has none for these modules."""
    present = tomllib.loads(path.read_text()).get("modules", {})
    lines = [path.read_text().rstrip()]
    for module, values in settings.items():
        if module not in present:
            lines.append(f"\n[modules.{module}]")
            lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    path.write_text("\n".join(lines) + "\n")
