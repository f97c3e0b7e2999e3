"""Fixtures for every test: a place with a real broker, embedded or in a container."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from support import EmbeddedPlace, Place
from support_containers import ContainerPlace, Engine, NoEngine, engine, no_containers

# A machine that is busy makes an example slow, not wrong.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


@pytest.fixture(scope="session")
def container_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A container engine for the whole session; where there is none, its tests are skipped, but never silently in CI."""
    with ExitStack() as stack:
        try:
            found = stack.enter_context(engine(tmp_path_factory.mktemp("engine")))
        except NoEngine as reason:
            no_containers(reason)
        yield found


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Place]:
    """An embedded broker with real credentials and every stream, of this test's own (about 0.1 s)."""
    place = EmbeddedPlace(tmp_path / "home")
    try:
        await place.prepare()
        yield place
    finally:
        await place.close()


@pytest.fixture(params=["embedded", "container"])
async def any_broker(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Place]:
    """The same place twice: with the embedded server, and with NATS in a container."""
    place: Place
    if request.param == "embedded":
        place = EmbeddedPlace(tmp_path / "home")
    else:
        place = ContainerPlace(tmp_path / "home", request.getfixturevalue("container_engine"))
    try:
        await place.prepare()
        yield place
    finally:
        await place.close()


#: What takes the machine itself as it is: kernel objects, namespaces, control groups, a container engine, the demo.
MACHINE = (
    "tests/kernel/",
    "tests/e2e/",
    "tests/attacks/test_power_",
    "tests/integration/test_bench_",
    "tests/integration/test_deploy_compose",
    "tests/integration/test_deploy_run",
    "tests/integration/test_host_spawner",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several workers (`make test`): a file is one worker's, and so is everything that takes the machine."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            if nodeid.startswith(MACHINE) or "[container" in nodeid:
                return "the machine"
            return super()._split_scope(nodeid)

    return Scheduling(config, log)
