"""deploy/compose.yaml as it stands, brought up by docker-compose itself: image, broker, services, and a host from outside."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import docker
import pytest
from docker.models.containers import Container
from support import eventually
from support_containers import Engine, NoEngine, engine, no_containers
from support_debian import root

REPOSITORY = Path(__file__).parents[2]
NAMES = ("broker", "eligibility", "delivery", "activation", "telemetry")
USER = 65532

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.broker,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        os.environ.get("LOOPBACK_COMPOSE") != "1",
        reason="it builds the image from a package index: 'make test-compose' runs it",
    ),
]


@pytest.fixture
def containers(tmp_path: Path) -> Iterator[Engine]:
    try:
        with engine(tmp_path) as found:
            yield found
    except NoEngine as none:
        no_containers(none)


def run(*command: str, cwd: Path | None = None, **more: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | more, capture_output=True, text=True, check=False, timeout=400
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-3000:]} {done.stderr[-3000:]}"
    return done.stdout


def loopback(home: Path, *words: str) -> str:
    return run(sys.executable, "-m", "loopback.cli.main", "--home", str(home), *words)


def checkout(place: Path) -> Path:
    """What git knows of this repository, and the wheels that the locks name: the engine reaches no network."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=REPOSITORY)
    for name in filter(None, listed.split("\0")):
        if (REPOSITORY / name).exists():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, place / name, follow_symlinks=False)
    run(
        *(
            "/usr/bin/python3",
            "-m",
            "pip",
            "download",
            "-q",
            "--disable-pip-version-check",
            "--require-hashes",
        ),
        *("-r", "requirements/bootstrap.txt", "-r", "requirements/services.txt", "-d", "wheels"),
        cwd=place,
    )
    return place


@contextmanager
def up(project: Path, home: Path) -> Iterator[None]:
    """The header's own words, with Debian's docker-compose."""
    compose = ("docker-compose", "-f", "deploy/compose.yaml", "-p", "loopback")
    try:
        run(*compose, "build", "-q", "eligibility", cwd=project, HOME_DIR=str(home))
        run(*compose, "up", "-d", cwd=project, HOME_DIR=str(home))
        yield
    finally:
        run(*compose, "down", "-v", "-t", "5", cwd=project, HOME_DIR=str(home))


def handed_over(home: Path) -> None:
    """What the header's chown names."""
    names = [
        home / "nats",
        *(home / "nats").rglob("*"),
        home / "keys" / "online",
        home / "tls" / "server.key",
    ]
    names += [*(home / "keys" / "online").rglob("*"), home / "creds" / "eligibility.issuer"]
    names += [home / "creds" / f"{name}.creds" for name in NAMES[1:]]
    for name in names:
        os.chown(name, USER, USER)


async def test_compose_brings_up_a_control_plane_that_a_host_outside_joins(
    containers: Engine, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    for folder in (tmp_path, *tmp_path.parents):
        if folder.owner() == "root" and folder != Path("/") and not folder.stat().st_mode & 0o001:
            folder.chmod(0o711)  # pytest's folders let nobody else through
    loopback(home, "keys", "init", "--unencrypted")
    loopback(home, "tls", "init", "--out", str(home / "tls"), "--host", f"server,broker,{containers.address}")
    handed_over(home)
    archive = tmp_path / "base.tar"
    root(archive)
    api = docker.APIClient(base_url=containers.url)
    client = docker.DockerClient(base_url=containers.url)
    try:
        api.import_image_from_file(str(archive), repository="python", tag="3.11-slim")
        with up(checkout(tmp_path / "project"), home):
            found: dict[str, Container] = {
                box.labels["com.docker.compose.service"]: box for box in client.containers.list()
            }
            assert set(found) == set(NAMES)
            await eventually(lambda: health(found["broker"]) == "healthy", 60)
            for name in NAMES[1:]:
                await eventually(
                    lambda name=name: b"waits: the broker has no stream" in found[name].logs(), 60
                )
            url = f"tls://{containers.address}:4222"
            loopback(home, "bus", "init", "--url", url)

            await eventually(
                lambda: {name: health(box) for name, box in found.items()} == dict.fromkeys(NAMES, "healthy"),
                90,
            )
            for name, box in found.items():
                box.reload()
                assert box.attrs["RestartCount"] == 0, (name, box.logs().decode())
                assert b"Traceback" not in box.logs(), (name, box.logs().decode())
                confined(name, box)
            joins(home, tmp_path / "web-1")
    finally:
        client.close()
        api.close()


def health(box: Container) -> str:
    box.reload()
    return str(box.attrs["State"]["Health"]["Status"])


def confined(name: str, box: Container) -> None:
    """As the kernel says it, not the compose file."""
    status = dict(
        line.split(":\t", 1)
        for line in Path(f"/proc/{box.attrs['State']['Pid']}/status").read_text().splitlines()
        if ":\t" in line
    )
    assert status["Uid"].split() == [str(USER)] * 4, name
    assert {status[one] for one in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}, name
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2"), name
    code, said = box.exec_run(["python", "-c", "open('/opt/x', 'w')"])
    assert code != 0 and b"Read-only file system" in said, (name, said)


def joins(home: Path, folder: Path) -> None:
    """A machine enrols over TLS with what the token carries, runs, and is seen."""
    loopback(home, "workspace", "put", "prod")
    loopback(home, "entitlement", "put", "fw", "--workspace", "prod", "--module", "firewall")
    package = folder.with_name("firewall.lbm")
    loopback(home, "module", "build", str(REPOSITORY / "modules" / "firewall"), "--out", str(package))
    loopback(home, "module", "publish", str(package))
    assert "firewall" in loopback(home, "module", "list")
    token = folder.with_suffix(".token")
    token.touch(0o600)
    token.write_text(loopback(home, "host", "invite", "web-1", "--workspace", "prod"))
    loopback(home, "host", "enroll", "--token-file", str(token), "--out", str(folder))
    with (folder / "log").open("wb") as log:
        agent = subprocess.Popen(
            [sys.executable, "-m", "loopback.cli.main", "host", "run", "--config", str(folder / "host.toml")],
            stdout=log, stderr=log,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while True:
            (shown,) = json.loads(loopback(home, "hosts", "--json"))
            if shown["state"] == "ok":
                break
            assert time.monotonic() < deadline, f"{shown} {(folder / 'log').read_text()}"
    finally:
        agent.terminate()
        agent.wait(60)
