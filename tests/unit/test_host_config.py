"""host.toml: every mistake names the file and the line or field."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopback.contracts.codes import Code, Refused
from loopback.host.config import Allow, HostConfig, load, write_config

GOOD = """
host = "web-1"
workspace = "prod"
url = "nats://127.0.0.1:4222"
creds = "host.creds"
root = "root.json"
state_dir = "/var/lib/loopback"

[allow]
modules = ["firewall"]
capabilities = ["CAP_BPF"]

[modules.firewall]
interfaces = ["eth0", "eth1"]
bpf_root = "/sys/fs/bpf/loopback"
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "host.toml"
    path.write_text(text)
    return path


def test_relative_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    config = load(written(tmp_path, GOOD))
    assert config.creds == tmp_path / "host.creds"
    assert config.state_dir == Path("/var/lib/loopback")
    assert config.modules["firewall"]["interfaces"] == ["eth0", "eth1"]
    assert config.heartbeat_s == 10


@pytest.mark.parametrize(
    ("change", "to", "words"),
    [
        ('host = "web-1"', "", "host"),
        ('host = "web-1"', 'host = "Web 1"', "host must match"),
        ('host = "web-1"', "host = 7", "host: Expected"),
        ("[allow]", "[allowed]", "allowed"),
        ('modules = ["firewall"]', "modules = [1]", "allow.modules"),
        ('"CAP_BPF"', '"BPF"', "allow.capabilities"),
        ("nats://127.0.0.1:4222", "127.0.0.1:4222", "url must be"),
        ('creds = "host.creds"', 'creds = "host.creds"\nheartbeat_s = 0', "heartbeat_s must lie"),
        ('workspace = "prod"', "workspace = ", "line 3"),
        ('bpf_root = "/sys/fs/bpf/loopback"', "bpf_root = {}", "modules"),
    ],
)
def test_a_mistake_names_the_file_and_the_place(tmp_path: Path, change: str, to: str, words: str) -> None:
    path = written(tmp_path, GOOD.replace(change, to))
    with pytest.raises(Refused) as caught:
        load(path)
    assert caught.value.code == Code.CONFIG_INVALID
    assert str(path) in caught.value.reason
    assert words in caught.value.reason


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="loopback host add"):
        load(tmp_path / "host.toml")


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(
    settings=st.dictionaries(
        TEXT, TEXT | st.booleans() | st.integers(-(2**60), 2**60) | st.lists(TEXT, max_size=3), max_size=4
    ),
    name=TEXT,
)
def test_what_is_written_is_read_again(
    tmp_path_factory: pytest.TempPathFactory, settings: dict[str, str | int | bool | list[str]], name: str
) -> None:
    path = tmp_path_factory.mktemp("config") / "host.toml"
    config = HostConfig(
        host="a",
        workspace="w",
        url="tls://x:1",
        creds=Path("/c"),
        root=Path("/r"),
        state_dir=Path("/s"),
        allow=Allow(modules=("firewall",), capabilities=("CAP_BPF",)),
        modules={name: dict(settings)},
    )
    write_config(config, path)
    assert load(path) == config
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
