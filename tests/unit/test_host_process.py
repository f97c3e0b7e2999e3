"""Real module processes, well-behaved and not, as the agent meets them."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from support import eventually

from loopback.contracts import abi
from loopback.contracts.codes import Code, Refused
from loopback.contracts.desired import Running
from loopback.host import proc, process, supervisor
from loopback.host.process import Launch, ModuleProcess

TINY = Path(__file__).parents[1] / "fixtures_modules" / "tiny.py"


def launch(tmp_path: Path, how: str = "healthy", argv: tuple[str, ...] = (), **more: object) -> Launch:
    (tmp_path / "module.toml").write_text('[module]\nname = "tiny"\nversion = "1.0"\n')
    (tmp_path / "behaviour.txt").write_text(how)
    return Launch(
        module="tiny",
        version="1.0",
        argv=argv or (sys.executable, str(TINY)),
        env={
            "PATH": os.environ["PATH"],
            "LOOPBACK_PACKAGE_DIR": str(tmp_path),
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        cwd=tmp_path,
        log=tmp_path / "log",
        stop_s=2.0,
        **more,  # type: ignore[arg-type]
    )


@asynccontextmanager
async def running(spec: Launch) -> AsyncIterator[ModuleProcess]:
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        module = await ModuleProcess.start(spec, group)
        try:
            yield module
        finally:
            await module.kill()


async def refusal(spec: Launch) -> Refused:
    with pytest.raises(ExceptionGroup) as caught:
        async with running(spec):
            pass
    (error,) = caught.value.exceptions
    assert isinstance(error, Refused)
    return error


def configure(tmp_path: Path) -> abi.Configure:
    return abi.Configure(host="h", workspace="w", state_dir=str(tmp_path))


async def test_a_module_goes_through_its_life(tmp_path: Path) -> None:
    async with running(launch(tmp_path)) as module:
        await module.request(configure(tmp_path))
        staged = await module.request(abi.Stage(digest="d1", serial=1, content=b"{}"))
        assert staged.detail == {"rules": "1"}
        await module.request(abi.Commit(digest="d1", trial_s=30))
        await module.request(abi.Confirm(digest="d1"))
        assert await module.health() == abi.HealthReport(state="ok", enforcing=True, policy="d1")
        await module.stop()
        assert module.exited.is_set()
    assert (tmp_path / "kernel.json").exists(), "a stop leaves the kernel enforcing"


async def test_a_restarted_module_adopts_and_a_stop_with_remove_leaves_nothing(tmp_path: Path) -> None:
    async with running(launch(tmp_path)) as module:
        await module.request(configure(tmp_path))
    async with running(launch(tmp_path)) as module:
        assert (await module.request(configure(tmp_path))).detail["adopted"] == "true"
        await module.stop(remove=True)
    assert not (tmp_path / "kernel.json").exists()


async def test_a_refusal_comes_back_with_the_modules_own_code(tmp_path: Path) -> None:
    async with running(launch(tmp_path)) as module:
        await module.request(configure(tmp_path))
        with pytest.raises(Refused) as caught:
            await module.request(abi.Stage(digest="d", serial=1, content=b'{"refuse": true}'))
        assert (caught.value.code, caught.value.next_step) == (Code.POLICY_INVALID, "write another one")


async def test_a_module_that_dies_at_commit_is_refused_as_died(tmp_path: Path) -> None:
    async with running(launch(tmp_path, "dies-at-commit")) as module:
        await module.request(configure(tmp_path))
        await module.request(abi.Stage(digest="d", serial=1, content=b"{}"))
        with pytest.raises(Refused) as caught:
            await module.request(abi.Commit(digest="d", trial_s=5))
        assert caught.value.code == Code.MODULE_DIED
        assert "exit status 4" in caught.value.reason
        with pytest.raises(Refused, match="ended"):
            await module.health()


async def test_a_module_that_hangs_is_refused_in_time_and_can_be_killed(tmp_path: Path) -> None:
    async with running(launch(tmp_path, "hangs-at-stage")) as module:
        await module.request(configure(tmp_path))
        with pytest.raises(Refused) as caught:
            await module.request(abi.Stage(digest="d", serial=1, content=b"{}"), 0.2)
        assert caught.value.code == Code.MODULE_TIMEOUT


async def test_a_module_that_hangs_at_its_end_is_ended(tmp_path: Path) -> None:
    async with running(launch(tmp_path, "hangs-at-stop")) as module:
        await module.request(configure(tmp_path))
        await module.stop()
        assert module.exited.is_set()
        with pytest.raises(Refused):
            await module.stop(remove=True)


async def test_another_abi_is_refused(tmp_path: Path) -> None:
    found = await refusal(launch(tmp_path, "wrong-abi"))
    assert found.code == Code.MODULE_ABI
    assert "ABI 99" in found.reason


async def test_a_module_that_ends_at_once_is_refused_with_its_last_words(tmp_path: Path) -> None:
    found = await refusal(launch(tmp_path, "ends-at-once"))
    assert found.code == Code.MODULE_START
    assert "a library is missing" in found.reason


async def test_a_silent_module_is_refused_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "HELLO_S", 0.3)
    assert (await refusal(launch(tmp_path, "silent"))).code == Code.MODULE_TIMEOUT


async def test_a_module_of_another_name_is_refused(tmp_path: Path) -> None:
    spec = launch(tmp_path)
    (tmp_path / "module.toml").write_text('[module]\nname = "tiny"\nversion = "2.0"\n')
    assert "says that it is tiny 2.0" in (await refusal(spec)).reason


async def test_a_program_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    assert (await refusal(launch(tmp_path, argv=("/no/such/program",)))).code == Code.MODULE_START


SPEAK = """
import os, socket, sys, time
sock = socket.socket(fileno=int(os.environ["LOOPBACK_ABI_FD"]))
sock.sendall(bytes.fromhex(sys.argv[1]))
time.sleep(30)
"""


@pytest.mark.parametrize("garbage", ["ffffffff", "00000003c1c1c1", "0000000180", "00000004deadbeef"])
async def test_garbage_from_a_module_is_refused_and_ends_it(tmp_path: Path, garbage: str) -> None:
    spec = launch(tmp_path, argv=(sys.executable, "-c", SPEAK, garbage))
    assert (await refusal(spec)).code == Code.MODULE_ABI


def status_of(pid: int) -> dict[str, str]:
    return dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())


def size_of_logs(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("log*"))


async def test_it_gets_exactly_its_capabilities_and_no_new_privileges(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root has capabilities to give up")
    async with running(launch(tmp_path, capabilities=("CAP_NET_ADMIN",))) as module:
        status = status_of(module.pid)
        assert int(status["CapEff"], 16) == 1 << 12
        assert int(status["CapBnd"], 16) == 1 << 12
        assert status["NoNewPrivs"] == "1"


async def test_what_a_module_leaves_behind_is_ended_with_it(tmp_path: Path) -> None:
    forks = "import os, sys, time\npid = os.fork()\nif pid: open('child', 'w').write(str(pid)); sys.exit(1)\ntime.sleep(60)"
    found = await refusal(launch(tmp_path, argv=(sys.executable, "-c", forks)))
    assert found.code == Code.MODULE_START
    child = int((tmp_path / "child").read_text())
    # It was told to end; that it lets go of its pipe comes a moment before it is gone.
    await eventually(lambda: proc.started_at(child) == 0)


async def test_its_log_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "MAX_LOG", 1000)
    talk = "import sys\nfor n in range(200): sys.stdout.write('x' * 99 + chr(10)); sys.stdout.flush()"
    await refusal(launch(tmp_path, argv=(sys.executable, "-c", talk)))
    assert 0 < size_of_logs(tmp_path) <= 2 * (64 * 1024 + 1000)


def test_a_process_is_known_by_when_it_started() -> None:
    assert proc.started_at(os.getpid()) > 0
    assert not proc.kill_group(os.getpid(), proc.started_at(os.getpid()) + 1), (
        "another process of that id is safe"
    )
    assert proc.started_at(2**22 + 5) == 0


async def test_a_large_policy_has_longer_to_be_staged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(supervisor.REQUEST_S, abi.Stage, 0.25)
    monkeypatch.setattr(supervisor, "STAGE_MIB_S", 0.25)
    target = Running("1.0", "c" * 64, "d" * 64, 1)
    async with running(launch(tmp_path, "hangs-at-stage")) as module:
        with pytest.raises(Refused, match=r"did not answer stage within 0\.75 s"):
            await supervisor.stage(module, target, bytes(2 * 2**20))
