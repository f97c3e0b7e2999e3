"""host.toml: every mistake names the file and the line or field."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopback.contracts.codes import Code, Refused
from loopback.host import config as config_module
from loopback.host.config import Allow, HostConfig, load, with_state_dir, write_config

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
        ("[allow]", '[allow]\npublishers = ["abc"]', "allow.publishers: 'abc' is no key id"),
        ("[allow]", f'[allow]\npublishers = ["{"A" * 64}"]', "allow.publishers"),
        ('host = "web-1"', "x = " + "[" * 5000, "recursion"),
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
        allow=Allow(modules=("firewall",), capabilities=("CAP_BPF",), publishers=("0" * 64,)),
        modules={name: dict(settings)},
    )
    write_config(config, path)
    assert load(path) == config
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda d: (d / "host.toml").chmod(0o664), "host.toml: the file can be changed by group 0"),
        (lambda d: (d / "host.toml").chmod(0o602), "host.toml: the file can be changed by everybody"),
        (lambda d: os.chown(d / "host.toml", 1000, 0), "host.toml: the file belongs to user 1000"),
        (lambda d: d.chmod(0o777), "the folder can be changed by everybody"),
        (lambda d: os.chown(d, 1000, 0), "the folder belongs to user 1000"),
        (lambda d: (d / "root.json").chmod(0o666), "root.json: the file can be changed by everybody"),
        (lambda d: (d / "host.creds").chmod(0o660), "host.creds: the file can be changed by group 0"),
        (lambda d: (d / "state").chmod(0o777), "state: the folder can be changed by everybody"),
    ],
)
def test_a_file_that_somebody_else_can_change_is_not_believed(
    tmp_path: Path, spoil: Callable[[Path], None], named: str
) -> None:
    """The allow-list is the owner's word only where nobody but the owner can write it."""
    folder = tmp_path / "etc"
    (folder / "state").mkdir(parents=True)
    for name in ("root.json", "host.creds"):
        (folder / name).write_text("")
    path = written(folder, GOOD.replace("/var/lib/loopback", "state"))
    path.chmod(0o600)
    load(path)
    spoil(folder)
    with pytest.raises(Refused) as caught:
        load(path)
    assert caught.value.code == Code.CONFIG_INVALID
    assert named in caught.value.reason
    assert caught.value.next_step.partition(" ")[0] in ("chmod", "make")


def test_a_link_is_followed_to_a_file_that_is_checked_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    real = written(tmp_path / "real", GOOD)
    (tmp_path / "etc").mkdir()
    link = tmp_path / "etc" / "host.toml"
    link.symlink_to(real)
    assert load(link).host == "web-1"
    (tmp_path / "real").chmod(0o777)
    with pytest.raises(Refused, match="real: the folder can be changed by everybody"):
        load(link)
    (tmp_path / "real").chmod(0o1777)
    assert load(link).host == "web-1", "in a folder like /tmp nobody else can replace it"


def spread(tmp_path: Path) -> Path:
    """A configuration of which every path lies three folders below `tmp_path` / above, each in its own tree."""
    for name in ("etc", "keys", "state"):
        (tmp_path / "above" / name / "mine" / "loopback").mkdir(parents=True)
    keys = tmp_path / "above" / "keys" / "mine" / "loopback"
    for name in ("root.json", "host.creds", "ca.pem"):
        (keys / name).write_text("")
    text = GOOD.replace('"host.creds"', f'"{keys}/host.creds"').replace('"root.json"', f'"{keys}/root.json"')
    text = text.replace("/var/lib/loopback", str(tmp_path / "above" / "state" / "mine" / "loopback"))
    text = text.replace("[allow]", f'ca = "{keys}/ca.pem"\n\n[allow]')
    path = written(tmp_path / "above" / "etc" / "mine" / "loopback", text)
    path.chmod(0o600)
    assert load(path).host == "web-1"
    return path


@pytest.mark.parametrize("tree", ["etc", "keys", "state", "."])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: folder.chmod(0o777), "the folder can be changed by everybody"),
        (lambda folder: folder.chmod(0o775), "the folder can be changed by group 0"),
        (lambda folder: os.chown(folder, 1000, 0), "the folder belongs to user 1000"),
        (lambda folder: (folder.chmod(0o1777), os.chown(folder, 1000, 0)), "the folder belongs to user 1000"),
    ],
)
def test_whoever_can_change_a_folder_far_above_could_put_another_tree_in_its_place(
    tmp_path: Path, tree: str, spoil: Callable[[Path], object], words: str
) -> None:
    path, folder = spread(tmp_path), tmp_path / "above" / tree
    spoil(folder)
    with pytest.raises(Refused) as caught:
        load(path)
    assert caught.value.code == Code.CONFIG_INVALID
    assert f"{folder}: {words}" in caught.value.reason
    assert str(folder) in caught.value.next_step


def test_a_folder_like_tmp_is_good_for_what_is_there_and_not_for_what_others_could_make_first(
    tmp_path: Path,
) -> None:
    path, folder = spread(tmp_path), tmp_path / "above" / "state"
    folder.chmod(0o1777)
    assert load(path).host == "web-1"
    (folder / "mine" / "loopback").rmdir()
    assert load(path).host == "web-1", "only we can make it, in a folder of ours"
    (folder / "mine").rmdir()
    with pytest.raises(Refused, match="state: the folder can be changed by everybody"):
        load(path)


def test_whoever_can_change_the_code_itself_is_no_one_to_ward_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root tries a checkout that lies in somebody's home."""
    path, home = spread(tmp_path), tmp_path / "above"
    os.chown(home, 1000, 0)
    with pytest.raises(Refused, match="above: the folder belongs to user 1000"):
        load(path)
    monkeypatch.setattr(config_module, "CODE", frozenset((home / "src" / "loopback" / "__init__.py").parents))
    assert load(path).host == "web-1"
    os.chown(home / "keys", 1000, 0)
    with pytest.raises(Refused, match="keys: the folder belongs to user 1000"):
        load(path)


def test_a_link_that_is_somebody_elses_leads_nowhere(tmp_path: Path) -> None:
    path = spread(tmp_path)
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    (shared / "link").symlink_to(path.parent)
    (tmp_path / "mine").symlink_to("shared/link")
    assert load(tmp_path / "mine" / "host.toml").host == "web-1"
    os.chown(shared / "link", 1000, 0, follow_symlinks=False)
    with pytest.raises(Refused, match="shared/link: the link belongs to user 1000"):
        load(tmp_path / "mine" / "host.toml")


def test_links_that_go_round_in_circles_are_refused(tmp_path: Path) -> None:
    path = spread(tmp_path)
    state = tmp_path / "above" / "state" / "mine" / "loopback"
    state.rmdir()
    state.symlink_to(state)
    with pytest.raises(Refused, match="cannot be read"):
        load(path)


def test_a_state_directory_that_was_named_on_the_command_line_is_looked_at_as_well(tmp_path: Path) -> None:
    config = load(spread(tmp_path))
    (tmp_path / "open" / "state").mkdir(parents=True)
    assert with_state_dir(config, tmp_path / "open" / "state").state_dir == tmp_path / "open" / "state"
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(Refused, match="open: the folder can be changed by everybody"):
        with_state_dir(config, tmp_path / "open" / "state")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda p: p.write_bytes(bytes(1 << 20))])
def test_what_is_no_configuration_is_refused_without_waiting(
    tmp_path: Path, make: Callable[[Path], object]
) -> None:
    make(tmp_path / "host.toml")
    with pytest.raises(Refused) as caught:
        load(tmp_path / "host.toml")
    assert caught.value.code == Code.CONFIG_INVALID
