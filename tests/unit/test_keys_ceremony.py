"""The ceremony: several keys with thresholds, encrypted where a person makes them, and what happens when it is cut short."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import select
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tuf.api.metadata import Root

from loopback.cli import home as installation
from loopback.cli import keyring, keys, keyshow, main, supervise, trustpublish
from loopback.contracts import pem
from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import KeyFile, SigningKey
from loopback.trust import signing

PASSPHRASE = "correct horse battery"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (keyring.FILE_VARIABLE, keyring.OFFLINE_VARIABLE):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    return secret_file(tmp_path / "passphrase", PASSPHRASE)


def secret_file(path: Path, text: str) -> Path:
    path.touch(0o600)
    path.write_text(text + "\n")
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(home: Path, *arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main.main(["--home", str(home), *map(str, arguments)])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return int(ended.value.code or 0), said.out, said.err

    return call


def plain_keys(folder: Path) -> set[str]:
    """Files below `folder` in which a private key can be read: by its PKCS#8 header, or by its raw bytes or their hex."""
    files = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    found = {p for p, data in files.items() if b"BEGIN PRIVATE KEY" in data}
    seeds = []
    for path in folder.rglob("*.pem"):
        with contextlib.suppress(Refused):
            seeds.append(SigningKey.load(path, PASSPHRASE.encode()).raw)
    found |= {p for p, data in files.items() for seed in seeds if seed in data or seed.hex().encode() in data}
    return {p.relative_to(folder).as_posix() for p in found}


ONLINE = {"keys/online/snapshot.pem", "keys/online/timestamp.pem"}


def test_with_a_passphrase_no_persons_key_is_ever_on_the_disk_in_the_clear(
    tmp_path: Path, secret: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[bytes] = []
    fsync = os.fsync

    def watch(descriptor: int) -> None:
        with contextlib.suppress(IsADirectoryError):
            written.append(Path(f"/proc/self/fd/{descriptor}").read_bytes())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    home = tmp_path / "home"
    assert run(home, "keys", "init", "--passphrase-file", secret)[0] == 0
    assert plain_keys(home) == ONLINE
    assert sum(b"BEGIN PRIVATE KEY" in data for data in written) == len(ONLINE)
    assert sum(b"BEGIN ENCRYPTED PRIVATE KEY" in data for data in written) == 4
    # the same search finds what it looks for where there was no passphrase
    assert run(tmp_path / "open", "keys", "init", "--unencrypted")[0] == 0
    assert len(plain_keys(tmp_path / "open")) == 4 + len(ONLINE)


def test_show_says_of_every_key_whether_it_is_encrypted_and_names_it_by_the_id_that_pins_use(
    tmp_path: Path, secret: Path, run: Run
) -> None:
    home = tmp_path / "home"
    run(home, "keys", "init", "--passphrase-file", secret)
    code, out, err = run(home, "keys", "show", "--json")
    shown = json.loads(out)
    assert (code, err, shown["unencrypted"], shown["problem"]) == (0, "", False, "")
    encrypted = {f["file"]: f["encrypted"] for f in shown["files"]}
    assert {name for name, yes in encrypted.items() if not yes} == ONLINE
    family = SigningKey.load(keys.offline_key(home, "module-firewall"), PASSPHRASE.encode())
    roles = {r["role"]: r for r in shown["roles"]}
    assert set(roles) == {"root", "targets", "snapshot", "timestamp", "module-firewall"}
    assert roles["module-firewall"]["keyids"] == [family.keyid]
    assert (roles["root"]["threshold"], round(roles["root"]["days_left"])) == (1, 730)
    (admin,) = shown["operators"]
    assert (admin["name"], admin["roles"]["*"][-1]) == ("admin", "admin")
    text = run(home, "keys", "show")[1]
    assert family.keyid in text
    assert "NOT ENCRYPTED" in text  # delivery's
    assert "for trying out" not in text
    assert "PRIVATE" not in text


def test_what_up_makes_by_itself_is_unencrypted_and_said_to_be(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    monkeypatch.delattr(pem, "encrypted")  # no key derivation: 'loopback up' starts as quickly as ever
    assert supervise.prepare(home, "127.0.0.1:4222")
    assert not KeyFile.read(keys.offline_key(home, "root")).encrypted
    shown = json.loads(run(home, "keys", "show", "--json")[1])
    assert shown["unencrypted"] is True
    assert "for trying out" in run(home, "keys", "show")[1]
    # and a key that is made there later needs no passphrase either
    assert keyring.protection(home) is keyring.unprotected


def test_without_a_terminal_and_a_passphrase_nothing_is_made_and_the_next_step_is_said(
    tmp_path: Path, run: Run
) -> None:
    code, out, err = run(tmp_path / "home", "keys", "init")
    assert (code, out) == (2, "")
    assert "--passphrase-file" in err
    assert "--unencrypted" in err
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    ("text", "mode", "said"), [("short", 0o600, "fewer than 12"), (PASSPHRASE, 0o644, "chmod 600")]
)
def test_a_passphrase_that_is_short_or_that_others_may_read_is_refused(
    text: str, mode: int, said: str, tmp_path: Path, run: Run
) -> None:
    file = secret_file(tmp_path / "passphrase", text)
    file.chmod(mode)
    code, _, err = run(tmp_path / "home", "keys", "init", "--passphrase-file", file)
    assert (code, said in err) == (2, True)
    assert list((tmp_path / "home").rglob("*.pem")) == []


def test_several_keys_of_a_role_are_dealt_out_to_media_and_the_threshold_stands_in_the_root(
    tmp_path: Path, secret: Path, run: Run
) -> None:
    home, media = tmp_path / "home", [tmp_path / f"stick{n}" for n in range(3)]
    for medium in media:
        medium.mkdir()
    where = [argument for medium in media for argument in ("--offline", medium)]
    code, _, err = run(
        home, "keys", "init", "--root-keys", 3, "--root-threshold", 2, "--targets-keys", 2, "--targets-threshold", 2,
        "--passphrase-file", secret, *where,
    )  # fmt: skip
    assert code == 0, err
    assert sorted(p.name for m in media for p in m.iterdir()) == [
        "module-firewall.pem", "root-1.pem", "root-2.pem", "root-3.pem", "targets-1.pem", "targets-2.pem",
    ]  # fmt: skip
    assert all(len(list(medium.glob("root-*.pem"))) == 1 for medium in media)  # no two of one role together
    root = signing.parse(Root, (home / "tuf" / "root.json").read_bytes())
    assert {role: (root.roles[role].threshold, len(root.roles[role].keyids)) for role in ("root", "targets")} == {
        "root": (2, 3), "targets": (2, 2),
    }  # fmt: skip
    trustpublish.repository_at(home, keys.seed_fetch(home))
    assert (
        run(tmp_path / "other", "keys", "init", "--root-keys", 1, "--root-threshold", 2, "--unencrypted")[0]
        == 2
    )


def test_a_second_ceremony_changes_nothing(tmp_path: Path, secret: Path, run: Run) -> None:
    home = tmp_path / "home"
    run(home, "keys", "init", "--passphrase-file", secret)
    before = {p: p.read_bytes() for p in home.rglob("*") if p.is_file()}
    code, _, err = run(home, "keys", "init", "--passphrase-file", secret)
    assert (code, "never overwritten" in err) == (2, True)
    assert {p: p.read_bytes() for p in home.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("keys_made", range(7))
def test_an_interrupted_ceremony_is_done_again_with_the_keys_that_it_made(
    keys_made: int, tmp_path: Path, secret: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut short after each key, and after the last before the root is pinned."""
    home = tmp_path / "home"
    monkeypatch.setattr(pem, "encrypted", lambda *a, encrypted=pem.encrypted: encrypted(*a, rounds=1000))
    save, count = SigningKey.save, 0

    def die(self: SigningKey, path: Path, passphrase: bytes | None = None) -> None:
        nonlocal count
        if count == keys_made:
            raise KeyboardInterrupt
        count += 1
        save(self, path, passphrase)

    with monkeypatch.context() as patched:
        patched.setattr(SigningKey, "save", die)
        if keys_made == 6:
            patched.setattr(
                "loopback.cli.ceremony.write_durably", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
            )
        assert run(home, "keys", "init", "--passphrase-file", secret)[0] == 130
    assert count == keys_made
    made = {p: p.read_bytes() for p in (home / "keys").rglob("*.pem")}
    assert len(made) == keys_made
    # another passphrase does not open them, and nothing is overwritten
    other = secret_file(tmp_path / "other", "another passphrase")
    if any(b"ENCRYPTED" in data for data in made.values()):
        code, _, err = run(home, "keys", "init", "--passphrase-file", other)
        assert (code, "does not open" in err) == (2, True)
        # nor does 'loopback up' put unencrypted keys beside them
        with pytest.raises(Refused, match="encrypted"):
            installation.begin(None, None)
            supervise.prepare(home, "127.0.0.1:4222")
    assert run(home, "keys", "init", "--passphrase-file", secret)[0] == 0
    assert {p: p.read_bytes() for p in made} == made
    assert plain_keys(home) == ONLINE
    trustpublish.repository_at(home, keys.seed_fetch(home))


def test_keys_of_an_interrupted_trial_are_encrypted_when_a_person_goes_on_with_a_passphrase(
    tmp_path: Path, secret: Path, run: Run
) -> None:
    home = tmp_path / "home"
    run(home, "keys", "init", "--unencrypted")
    (home / "tuf" / "root.json").unlink()  # what is written last was never written
    before = SigningKey.load(keys.offline_key(home, "root")).keyid
    assert run(home, "keys", "init", "--passphrase-file", secret)[0] == 0
    assert plain_keys(home) == ONLINE
    assert SigningKey.load(keys.offline_key(home, "root"), PASSPHRASE.encode()).keyid == before


def test_an_encrypted_key_opens_with_openssl_and_with_no_other_passphrase(tmp_path: Path) -> None:
    key, path = SigningKey.generate(), tmp_path / "k.pem"
    key.save(path, PASSPHRASE.encode())
    file = KeyFile.read(path)
    assert (file.encrypted, file.public and file.public.keyid) == (True, key.keyid)
    for passphrase in (None, b"", b"wrong passphrase"):
        with pytest.raises(Refused) as caught:
            SigningKey.load(path, passphrase)
        assert caught.value.code == Code.SIGNATURE_INVALID
    said = subprocess.run(
        ["openssl", "pkey", "-in", path, "-passin", "env:P", "-outform", "DER", "-pubout"],
        env={**os.environ, "P": PASSPHRASE}, capture_output=True, check=True,
    )  # fmt: skip
    assert said.stdout.endswith(key.public.raw)
    # a file that claims another public key is not used for it
    lying = path.read_bytes().replace(key.public.text.encode(), SigningKey.generate().public.text.encode())
    path.write_bytes(lying)
    with pytest.raises(Refused, match="another key"):
        SigningKey.load(path, PASSPHRASE.encode())


def test_a_passphrase_is_changed_and_a_key_gets_its_first_one(tmp_path: Path, secret: Path, run: Run) -> None:
    file, new = tmp_path / "me.pem", secret_file(tmp_path / "new", "another passphrase")
    code, out, err = run(tmp_path, "keys", "new", file, "--unencrypted")
    key = SigningKey.load(file)
    assert (code, out.strip(), key.keyid in err) == (0, key.public.text, True)
    assert run(tmp_path, "keys", "new", file, "--unencrypted")[0] == 2  # never overwritten
    assert run(tmp_path, "keys", "passphrase", file, "--new-passphrase-file", secret)[0] == 0
    assert SigningKey.load(file, PASSPHRASE.encode()).keyid == key.keyid
    arguments = ("keys", "passphrase", file, "--passphrase-file", secret, "--new-passphrase-file", new)
    assert run(tmp_path, *arguments)[0] == 0
    assert SigningKey.load(file, b"another passphrase").keyid == key.keyid
    assert run(tmp_path, *arguments)[0] == 2  # the old one opens it no longer
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_file_that_is_no_key_beside_the_keys_is_said_and_left_out(tmp_path: Path, run: Run) -> None:
    home = tmp_path / "home"
    run(home, "keys", "init", "--unencrypted")
    (home / "keys" / "offline" / "ca.pem").write_text("-----BEGIN CERTIFICATE-----\n")
    code, out, err = run(home, "keys", "show", "--json")
    assert (code, "ca.pem is not a readable private key" in err) == (0, True)
    assert len(json.loads(out)["files"]) == 6


def test_one_invocation_asks_for_each_passphrase_once(tmp_path: Path) -> None:
    asked: list[str] = []

    def ask(prompt: str) -> str:
        asked.append(prompt)
        return "wrong passphrase" if len(asked) == 1 else PASSPHRASE

    files = [tmp_path / name for name in ("a.pem", "b.pem")]
    for file in files:
        SigningKey.generate().save(file, PASSPHRASE.encode())
    ring = keyring.Keyring(ask=ask)
    opened = [ring.open(file) for file in (*files, *files)]
    assert len(asked) == 2  # a wrong one, and the right one, which opens the other file and both again
    assert opened[0] is opened[2]
    with pytest.raises(Refused, match="in 3 tries"):
        keyring.Keyring(ask=lambda _: "wrong passphrase").open(files[0])
    with pytest.raises(Refused, match="encrypted"):
        keyring.Keyring().open(files[0])


def test_a_new_passphrase_is_asked_for_twice_and_must_be_long(capsys: pytest.CaptureFixture[str]) -> None:
    answers = iter(["short", PASSPHRASE, PASSPHRASE + "x", PASSPHRASE, PASSPHRASE])
    ring = keyring.Keyring(ask=lambda _: next(answers))
    assert ring.choose("root") == PASSPHRASE.encode()
    said = capsys.readouterr().err
    assert "too few" in said
    assert "differ" in said


def test_every_key_can_have_a_passphrase_of_its_own(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    words: dict[str, str] = {}

    def ask(prompt: str) -> str:
        if "again" in prompt:
            return next(reversed(words.values()))
        name = prompt.split(" for ")[1].split(" ")[0]
        return words.setdefault(name, f"the passphrase of {name}")

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(keyring, "ask_hidden", ask)
    home = tmp_path / "home"
    assert run(home, "keys", "init", "--each", "--root-keys", 2)[0] == 0
    assert set(words) == {"root-1.pem", "root-2.pem", "targets.pem", "module-firewall.pem", "admin.pem"}
    for path in (home / "keys").rglob("*.pem"):
        if path.name in words:
            SigningKey.load(path, words[path.name].encode())


@contextlib.contextmanager
def terminal(*arguments: object) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """The real command on a terminal of its own."""
    ours, theirs = pty.openpty()

    def take_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        [sys.executable, "-m", "loopback.cli.main", *map(str, arguments)],
        stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=take_terminal, close_fds=True,
    )  # fmt: skip
    os.close(theirs)
    try:
        yield ours, process
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def read_until(terminal: int, words: str, seconds: float = 60) -> str:
    """What the terminal shows until these words are there, or it hangs up."""
    seen, deadline = "", time.monotonic() + seconds
    while words not in seen:
        assert time.monotonic() < deadline, seen
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                seen += os.read(terminal, 4096).decode()
            except OSError:  # the other side is gone: what a terminal says at its end
                assert words in seen, seen
    return seen


def test_on_a_real_terminal_the_passphrase_is_asked_for_twice_and_never_shown(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with terminal("--home", home, "keys", "init") as (screen, process):
        seen = read_until(screen, "or more): ")
        os.write(screen, f"{PASSPHRASE}\n".encode())
        seen += read_until(screen, "again: ")
        os.write(screen, f"{PASSPHRASE}\n".encode())
        seen += read_until(screen, "loopback up")
        assert process.wait(60) == 0
    assert PASSPHRASE not in seen
    assert plain_keys(home) == ONLINE
    SigningKey.load(keys.offline_key(home, "root"), PASSPHRASE.encode())


@pytest.mark.parametrize(
    ("role", "before"),
    [("root", timedelta(days=90)), ("targets", timedelta(days=30)), ("module-firewall", timedelta(days=30))],
)
def test_show_warns_of_an_end_long_before_it_and_says_what_to_do(
    role: str, before: timedelta, tmp_path: Path, run: Run
) -> None:
    home = tmp_path / "home"
    run(home, "keys", "init", "--unencrypted")
    life = signing.life(role)
    made = datetime.now(UTC)
    calm = keyshow.look(home, made + life - before - timedelta(days=1))
    assert not any(role in said for said in keyshow.warnings(calm))
    said = keyshow.warnings(keyshow.look(home, made + life - before + timedelta(days=1)))
    assert [line for line in said if line.startswith(role) and f"loopback keys renew {role}" in line]
    assert any("has expired" in line for line in keyshow.warnings(keyshow.look(home, made + life * 2)))


def test_show_ends_with_1_where_something_must_be_renewed_soon(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    monkeypatch.setattr(signing, "TARGETS_LIFE", timedelta(days=20))
    run(home, "keys", "init", "--unencrypted")
    code, out, err = run(home, "keys", "show")
    assert (code, "loopback keys renew targets" in err) == (1, True)
    assert "20.0 d !" in out


def test_before_the_root_is_pinned_all_that_it_stands_on_survives_a_power_cut(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key on a medium that is unplugged, a file of the first repository: what was only in memory would be lost, and the
    pinned root forbids a second ceremony."""
    home, medium = tmp_path / "home", tmp_path / "medium"
    medium.mkdir()
    steps = 0
    flushed: dict[tuple[int, int], int] = {}  # the step at which a file or folder was flushed last
    renamed: dict[Path, int] = {}  # … at which an entry of a folder was made last
    lost: list[Path] = []
    fsync, replace = os.fsync, Path.replace

    def flush(descriptor: int) -> None:
        nonlocal steps
        steps += 1
        fsync(descriptor)
        about = os.fstat(descriptor)
        flushed[about.st_dev, about.st_ino] = steps

    def at(path: Path) -> int:
        about = path.stat()
        return flushed.get((about.st_dev, about.st_ino), -1)

    def rename(self: Path, target: Path) -> Path:
        nonlocal steps
        steps += 1
        if target.name == "root.json":
            kept = [p for place in (home, medium) for p in place.rglob("*") if p.is_file() and p != self]
            lost.extend(p for p in kept if at(p) < 0 or at(p.parent) < renamed.get(p.parent, 0))
        renamed[target.parent] = steps
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(Path, "replace", rename)
    assert run(home, "keys", "init", "--unencrypted", "--offline", medium)[0] == 0
    assert [path.relative_to(tmp_path).as_posix() for path in lost] == []
    assert len(renamed) >= 4
