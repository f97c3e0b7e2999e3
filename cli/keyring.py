"""Where a person's keys lie and how they are opened: folders and media, passphrases, and what was opened once.

One invocation of the command asks for a passphrase once: what opened one key is tried on the next. A passphrase comes from a
terminal, hidden, or from a file; never from a flag, which other users of the machine could read.
"""

from __future__ import annotations

import getpass
import os
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from weakref import WeakKeyDictionary

from loopback.cli import home as home_of
from loopback.cli.home import PASSPHRASE_VARIABLE, Invocation
from loopback.contracts import subjects
from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import LOCKED_NEXT, KeyFile, PublicKey, SigningKey

FILE_VARIABLE: Final = PASSPHRASE_VARIABLE
OFFLINE_VARIABLE: Final = "LOOPBACK_OFFLINE"
SHORTEST: Final = (
    12  # characters; at the key derivation's cost, eight lower-case letters last a week on one graphics card
)
TRIES: Final = 3  # at the terminal, before we give up

#: Gives the passphrase for a new key of this name; None leaves it unencrypted.
Protect = Callable[[str], bytes | None]


def unprotected(_name: str) -> bytes | None:
    """Leaves every key unencrypted, for trying out."""
    return None


def ask_hidden(prompt: str) -> str:
    """A line from the terminal, which does not show it."""
    with answering():
        return getpass.getpass(prompt, stream=sys.stderr)


@contextmanager
def answering() -> Iterator[None]:
    """While a person answers at the terminal, Ctrl-C ends the wait at once.

    asyncio's own handler cancels the task and returns: whoever blocks the loop by reading hears nothing of the first Ctrl-C.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Keyring:
    """What one invocation knows. `ask` asks at the terminal; None where there is none."""

    def __init__(
        self,
        passphrase_file: Path | None = None,
        offline: Sequence[Path] = (),
        ask: Callable[[str], str] | None = None,
    ) -> None:
        self.passphrase_file = passphrase_file
        self.offline = tuple(offline)
        self._ask = ask
        self._known: list[bytes] = []
        self._opened: dict[str, SigningKey] = {}
        self._read_file = False

    def remember(self, key: SigningKey) -> None:
        """Use this key without opening its file."""
        self._opened[key.keyid] = key

    def opened(self) -> list[SigningKey]:
        """The keys that were opened or made."""
        return list(self._opened.values())

    def open(self, path: Path) -> SigningKey:
        """The key in this file. Raises Refused(SIGNATURE_INVALID)."""
        file = KeyFile.read(path)
        if file.public is not None and file.public.keyid in self._opened:
            return self._opened[file.public.keyid]
        key = SigningKey.load(path) if not file.encrypted else self._unlock(path)
        self.remember(key)
        return key

    def _unlock(self, path: Path) -> SigningKey:
        self._take_file()
        for passphrase in self._known:
            try:
                return SigningKey.load(path, passphrase)
            except Refused:
                continue
        if self._ask is None:
            if self._known:
                raise Refused(Code.SIGNATURE_INVALID, f"the passphrase does not open {path}", LOCKED_NEXT)
            raise Refused(Code.SIGNATURE_INVALID, f"{path} is encrypted", LOCKED_NEXT)
        for _ in range(TRIES):
            passphrase = self._ask(f"Passphrase of {path}: ").encode()
            try:
                key = SigningKey.load(path, passphrase)
            except Refused as refused:
                print(f"  {refused.reason}", file=sys.stderr)
                continue
            self._known.append(passphrase)
            return key
        raise Refused(
            Code.SIGNATURE_INVALID, f"{path} was not opened in {TRIES} tries", "find its passphrase"
        )

    def choose(self, what: str, *, fresh: bool = False) -> bytes:
        """A passphrase for new keys: the one known already, from the file, or asked for twice. With `fresh`, asked for again.

        Raises Refused where there is neither file nor terminal, or it is too short.
        """
        self._take_file()
        if self._known and not fresh:
            return self._known[-1]
        if self._ask is None:
            raise Refused(
                Code.SIGNATURE_INVALID, f"there is nobody to choose a passphrase for {what}", LOCKED_NEXT
            )
        for _ in range(TRIES):
            first = self._ask(f"New passphrase for {what} ({SHORTEST} characters or more): ")
            if len(first) < SHORTEST:
                print(f"  {len(first)} characters are too few", file=sys.stderr)
            elif self._ask("The same again: ") != first:
                print("  the two differ", file=sys.stderr)
            else:
                self._known.append(first.encode())
                return self._known[-1]
        raise Refused(Code.SIGNATURE_INVALID, f"no passphrase was chosen in {TRIES} tries", "begin again")

    @property
    def can_ask(self) -> bool:
        """Whether somebody sits at a terminal."""
        return self._ask is not None

    @property
    def has_file(self) -> bool:
        """Whether a file with the passphrase was named."""
        return self.passphrase_file is not None

    def _take_file(self) -> None:
        if self.passphrase_file is None or self._read_file:
            return
        self._read_file = True
        self._known.append(read_passphrase(self.passphrase_file))


def read_passphrase(path: Path) -> bytes:
    """The first line of a file that nobody else may read. Raises Refused(SIGNATURE_INVALID)."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            line = file.readline(4096).rstrip(b"\r\n")
    except OSError as error:
        raise Refused(
            Code.SIGNATURE_INVALID, f"the passphrase file {path} does not read: {error.strerror}"
        ) from None
    if stat.S_ISREG(status.st_mode) and status.st_mode & 0o077:
        raise Refused(
            Code.SIGNATURE_INVALID, f"others may read the passphrase file {path}", f"chmod 600 {path}"
        )
    if len(line) < SHORTEST:
        raise Refused(
            Code.SIGNATURE_INVALID,
            f"the passphrase in {path} has {len(line)} characters, fewer than {SHORTEST}",
            "choose a longer one",
        )
    return line


_rings: WeakKeyDictionary[Invocation, Keyring] = WeakKeyDictionary()


def use(passphrase_file: Path | None = None, offline: Sequence[Path] = ()) -> Keyring:
    """What a command's own options say, beside those of the invocation; its keyring."""
    found = ring()
    found.passphrase_file = passphrase_file or found.passphrase_file
    found.offline = (*offline, *found.offline)
    return found


def ring() -> Keyring:
    """This invocation's keyring."""
    invocation = home_of.invocation()
    found = _rings.get(invocation)
    if found is None:
        folders = filter(None, os.environ.get(OFFLINE_VARIABLE, "").split(os.pathsep))
        found = _rings[invocation] = Keyring(
            invocation.passphrase_file,
            [Path(folder) for folder in folders],
            ask_hidden if sys.stdin.isatty() else None,
        )
    return found


def offline_key(home: Path, name: str) -> Path:
    """Where the first key `root`, `targets` or `module-<family>` is made. It belongs on a medium that is usually unplugged."""
    return home / "keys" / "offline" / f"{name}.pem"


def online_key(home: Path, name: str) -> Path:
    """Where delivery's first key `snapshot` or `timestamp` is made."""
    return home / "keys" / "online" / f"{name}.pem"


def operator_key(home: Path, name: str) -> Path:
    """Where an operator's key is."""
    return home / "keys" / "operators" / f"{subjects.token(name)}.pem"


def offline_folders(home: Path) -> list[Path]:
    """Where offline keys are looked for: the folders that were named, then the home's own. Raises Refused for a missing one."""
    for folder in ring().offline:
        if not folder.is_dir():
            raise Refused(
                Code.SIGNATURE_INVALID, f"there is no folder {folder}", "plug in the medium, or name another"
            )
    return [*ring().offline, home / "keys" / "offline"]


def key_files(folders: Iterable[Path]) -> Iterator[KeyFile]:
    """Every key file in these folders; what is none is said and left out."""
    for folder in folders:
        for path in sorted(folder.glob("*.pem")):
            try:
                yield KeyFile.read(path)
            except Refused as refused:
                print(f"left out: {refused.reason}", file=sys.stderr)


def files_of(home: Path, keys: Iterable[PublicKey]) -> list[Path]:
    """The files of those of these keys that lie in a folder at hand and are not opened yet."""
    wanted = {key.keyid for key in keys} - {key.keyid for key in ring().opened()}
    return [
        file.path
        for file in key_files(offline_folders(home))
        if file.public is not None and file.public.keyid in wanted
    ]


def protected(home: Path) -> bool:
    """Whether people's keys of this home are encrypted: new ones then are as well. So it is where none is at hand."""
    files = list(key_files([*offline_folders(home), home / "keys" / "operators"]))
    return not files or any(file.encrypted for file in files)


def protection(home: Path) -> Protect:
    """How new keys of this home are protected: with a passphrase where one was named, or its other keys have one."""
    if ring().has_file or protected(home):
        return ring().choose
    return unprotected


def new_key(folder: Path, name: str, protect: Protect) -> tuple[SigningKey, Path]:
    """A new key in a file of this name, or the next free one; it is opened already."""
    path = folder / f"{name}.pem"
    number = 2
    while path.exists():
        path = folder / f"{name}-{number}.pem"
        number += 1
    key = SigningKey.generate()
    key.save(path, protect(path.name))
    ring().remember(key)
    return key, path


def keep(path: Path, protect: Protect) -> SigningKey:
    """The key in this file, made where there is none. One that lies there in the clear is encrypted if it should be."""
    if not path.exists():
        key = SigningKey.generate()
        key.save(path, protect(path.name))
        ring().remember(key)
        return key
    plain = not KeyFile.read(path).encrypted
    key = ring().open(path)
    if plain and (passphrase := protect(path.name)) is not None:
        key.save(path, passphrase)
    return key
