"""What is in deploy/: units scored and verified by systemd's own tools, and nothing that listens or connects in the clear."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from loopback.services._runtime.settings import Settings

DEPLOY = Path(__file__).parents[2] / "deploy"
UNITS = DEPLOY / "systemd"
GOALS = {"loopback-host.service": 4.0, "loopback-nats.service": 1.5, "loopback-service@.service": 1.5}
FILES = [path for path in sorted(DEPLOY.rglob("*")) if path.is_file() and path.name != "setup.sh"]

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None,
    reason="systemd-analyze is missing: 'deploy/setup.sh test' installs it",
)


def test_every_unit_has_a_goal() -> None:
    assert {path.name for path in UNITS.glob("*.service")} == GOALS.keys()


@needs_systemd
@pytest.mark.parametrize("unit", sorted(GOALS))
def test_a_units_exposure_is_below_its_goal(unit: str) -> None:
    # The threshold is in tenths; what is over it makes the tool fail.
    command = [
        "systemd-analyze",
        "security",
        "--offline=yes",
        "--no-pager",
        f"--threshold={GOALS[unit] * 10:.0f}",
    ]
    done = subprocess.run([*command, str(UNITS / unit)], capture_output=True, text=True, check=False)
    said = [line for line in done.stdout.splitlines() if "Overall" in line]
    assert done.returncode == 0, done.stdout
    assert said, done.stderr
    assert "ignoring" not in done.stderr and "Unknown" not in done.stderr, done.stderr


@needs_systemd
def test_the_tool_does_fail_above_a_goal(tmp_path: Path) -> None:
    bare = tmp_path / "bare.service"
    bare.write_text("[Service]\nExecStart=/bin/true\n")
    command = ["systemd-analyze", "security", "--offline=yes", "--no-pager", "--threshold=40", str(bare)]
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0


@needs_systemd
@pytest.mark.parametrize("unit", sorted(GOALS))
def test_systemd_understands_every_line(unit: str, tmp_path: Path) -> None:
    """As installed: the programs exist, and the templated unit has an instance."""
    text = (UNITS / unit).read_text()
    for program in ("loopback", "nats-server"):
        (tmp_path / program).write_text("#!/bin/sh\n")
        (tmp_path / program).chmod(0o755)
    place = tmp_path / unit.replace("@", "@telemetry")
    place.write_text(text.replace("/opt/loopback/bin", str(tmp_path)))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(place)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, ""), done.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_is_reached_or_offered_in_the_clear(path: Path) -> None:
    text = "\n".join(line for line in path.read_text().splitlines() if not line.lstrip().startswith("#"))
    assert not re.search(r"\bnats://|\bws://|no_tls|verify:\s*false|insecure", text), path
    for address in re.findall(r"http://([\w.-]+)", text):
        assert address == "127.0.0.1", f"{path}: {address}"
    assert not re.search(
        r"^\s*(http|http_port|monitor_port|websocket|mqtt|leafnodes|gateway)\b\s*[:={]", text, re.MULTILINE
    )
    listening = len(re.findall(r"^\s*listen:", text, re.MULTILINE))
    encrypted = len(re.findall(r"^\s*tls\s*\{", text, re.MULTILINE))
    assert listening == encrypted, f"{path}: {listening} listeners, {encrypted} tls blocks"


def test_routes_between_servers_show_certificates_both_ways() -> None:
    text = (DEPLOY / "nats-cluster" / "common.conf").read_text()
    cluster = text[text.index("cluster {") :]
    assert re.search(r"verify: true", cluster)
    assert len(re.findall(r"tls://nats-\d", cluster)) == 3
    assert "sync_interval: always" in text


def test_containers_have_no_privilege_and_no_writable_root() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert compose["services"].keys() == {"broker", "eligibility", "delivery", "activation", "telemetry"}
    for name, service in compose["services"].items():
        assert (
            service["read_only"] is True and service["cap_drop"] == ["ALL"] and "privileged" not in service
        ), name
        assert service["security_opt"] == ["no-new-privileges:true"] and service["user"] != "0", name
        assert not {"environment", "env_file"} & service.keys(), f"{name}: secrets are files"
        if name != "broker":
            assert service["command"][service["command"].index("--url") + 1] == "tls://broker:4222"
            assert "ports" not in service
            mine = {one["source"] if isinstance(one, dict) else one for one in service["secrets"]} - {
                "ca",
                "root",
            }
            assert mine == ({name, "issuer"} if name == "eligibility" else {name}), f"{name} is given {mine}"
    assert {secret["file"].rsplit("/", 1)[-1] for secret in compose["secrets"].values()} >= {
        "ca.pem",
        "server.key",
    }


def test_eligibility_finds_what_it_issues_identities_with_where_units_and_containers_have_it(
    tmp_path: Path,
) -> None:
    """Every invitation was refused there, while the installation on one machine worked."""
    drop_in = (UNITS / "loopback-service@eligibility.service.d" / "issuer.conf").read_text()
    given = re.findall(
        r"^LoadCredential=([^:]+):", (UNITS / "loopback-service@.service").read_text() + drop_in, re.M
    )
    asked = re.search(r"--creds %d/(\S+)", (UNITS / "loopback-service@.service").read_text())
    assert asked and asked[1] in given
    found(tmp_path / "unit", given, asked[1], "service.issuer")
    eligibility = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["eligibility"]
    given = [one["target"] if isinstance(one, dict) else one for one in eligibility["secrets"]]
    path = Path(eligibility["command"][eligibility["command"].index("--creds") + 1])
    assert path.parent == Path("/run/secrets") and path.name in given
    found(tmp_path / "container", given, path.name, "eligibility.issuer")


def found(folder: Path, given: list[str], creds: str, issuer: str) -> None:
    folder.mkdir()
    for name in given:
        (folder / name).touch()
    settings = Settings(url="tls://broker:4222", creds=folder / creds, home=folder / "home")
    assert settings.issuer == folder / issuer
