"""The spawner's own copies of packages: what a module is started from, where the agent cannot write.

The agent unpacks a version and may, if it is stolen, change it again at any time. So before a version's first start the spawner
copies it, computes the digest of the copy's one archive, and has the signatures over that digest
checked: from the root that the machine's owner pinned, through whatever roots followed it, to the role that may sign
this module. The metadata is what the agent keeps; it is read by a child that has given up everything first. Not
checked here are expiry and withdrawal of a single release, which are the agent's to judge: an old version that was once signed
can be started by a stolen agent, as the owner's own way back needs it to be. But metadata older than any seen here is refused,
so a key that was taken away stays away.

    <state_dir>.sealed/<digest>/     one copy each
    <state_dir>.sealed/<digest>.json who signed it: written once the signatures were checked
    <state_dir>.sealed/floor.json    the newest metadata seen

A start needs the copy alone: no network, no metadata, no agent's word.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import stat
from pathlib import Path
from typing import Final

import msgspec

from loopback.contracts import subjects
from loopback.contracts.codes import Code, Refused
from loopback.host import confine, seccomp
from loopback.host.config import HostConfig
from loopback.host.publishers import check_publishers
from loopback.trust import manifest as manifests
from loopback.trust import package, tree
from loopback.trust.manifest import Manifest

VERIFY_S: Final = 20  # for checking signatures, which takes some milliseconds
WAIT_S: Final = 300  # for a question to a verifier that was made ready; a download may take as long
MAX_ROOTS: Final = 256  # as the verifying client follows
MAX_METADATA: Final = 768 * 1024  # bytes of one file, as the verifying client takes
MAX_ANSWER: Final = 64 * 1024  # bytes of the verifying child's answer
_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What the verifying child found: the signed digest, versions by role, and our ids of the keys that signed.

    Or why not: `code`, `reason`.
    """

    sha256: str = ""
    versions: dict[str, int] = {}
    signers: tuple[str, ...] = ()
    code: str = ""
    reason: str = ""


class Floor(msgspec.Struct, frozen=True, kw_only=True):
    """The newest versions seen, and below which pinned root (SHA-256 of its file) they count."""

    root: str = ""
    versions: dict[str, int] = {}


class Seal(msgspec.Struct, frozen=True, kw_only=True):
    """Beside each copy: the ids of the keys that signed it, since the owner may allow other publishers later."""

    signers: tuple[str, ...]


class Sealed:
    """The folder of copies. Everything here blocks."""

    def __init__(self, config: HostConfig) -> None:
        self.config = config
        self.dir = sealed_dir(config.state_dir)
        self._verifier: Verifier | None = None

    def prepare(self) -> None:
        """Have a verifier ready: a new version is on its way, and python-tuf takes a quarter of a second to import."""
        if self._verifier is None or not self._verifier.alive():
            self._verifier = Verifier()

    def open(self, module: str, version: str, digest: str) -> tuple[Path, Manifest]:
        """A verified copy of this package, made now where there is none, and what its manifest says.

        Raises Refused: PACKAGE_*, MANIFEST_*, TUF_INVALID, HOST_DISK, HOST_NOT_ALLOWED.
        """
        if not is_digest(digest):
            raise Refused(Code.PACKAGE_DIGEST, f"{digest[:80]!r} is no SHA-256 in hex")
        manifests.check_module_name(module)
        folder = self.dir / digest
        try:
            self.dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._check_own()
            if (seal := self._seal(folder)) is None:
                seal = self._admit(module, version, digest, folder)
            path = folder / package.MANIFEST
            found = manifests.parse(path.read_bytes(), str(path))
        except OSError as error:
            said = f"{error.filename or self.dir}: {error.strerror or error}"
            raise Refused(Code.HOST_DISK, said, "free or repair the disk") from None
        if (found.name, found.version) != (module, version):
            said = f"the package is {found.name} {found.version}, not {module} {version}"
            raise Refused(Code.PACKAGE_UNKNOWN, said)
        check_publishers(seal.signers, self.config.allow.publishers, None, False, what=f"{module} {version}")
        return folder, found

    def _check_own(self) -> None:
        """Where others could make this folder before the spawner did, its seals would be theirs. Raises Refused(HOST_DISK)."""
        status = self.dir.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise Refused(
                Code.HOST_DISK,
                f"{self.dir} is no folder that only this spawner's user can change",
                "remove it, and see who else can write beside the state directory",
            )

    def sweep(self) -> None:
        """Remove the copies of versions that the agent does not keep any more."""
        kept = {
            place.name.rpartition("-")[2]
            for place in (self.config.state_dir / "modules").glob("*/versions/*")
        }
        with contextlib.suppress(OSError):
            for entry in self.dir.iterdir():
                if is_digest(entry.name[:64]) and entry.name[:12] not in kept:
                    _remove(entry)

    def _seal(self, folder: Path) -> Seal | None:
        """What was found when this copy was made, if it is there and as it was; a damaged one is made anew."""
        try:
            seal = msgspec.json.decode(_seal_path(folder).read_bytes(), type=Seal)
            tree.verify(folder, sha256=folder.name)
        except (FileNotFoundError, msgspec.MsgspecError, Refused):
            return None
        return seal

    def _admit(self, module: str, version: str, digest: str, folder: Path) -> Seal:
        place = ("modules", subjects.token(module), "versions", f"{subjects.token(version)}-{digest[:12]}")
        scratch = self.dir / ".new"
        try:
            source = open_below(self.config.state_dir, *place)
        except OSError as error:
            said = f"{module} {version} is not unpacked here: {error.strerror}"
            raise Refused(Code.PACKAGE_UNKNOWN, said, "have it rolled out again") from None
        try:
            _remove(scratch)
            scratch.mkdir(mode=0o755)
            target = os.open(scratch, _FOLDER)
            try:
                copy_tree(source, target, [package.MAX_MEMBERS + package.MAX_FOLDERS, package.MAX_PACKAGE])
            finally:
                os.close(target)
            tree.verify(scratch, sha256=digest)
            seal = Seal(signers=self._check_signed(module, version, digest))
            _remove(folder)
            _write(_seal_path(folder), msgspec.json.encode(seal))
            scratch.rename(folder)
            _sync(self.dir)
            return seal
        finally:
            os.close(source)
            _remove(scratch)

    def _check_signed(self, module: str, version: str, digest: str) -> tuple[str, ...]:
        """Who signed this release. Raises Refused where nobody entitled did, or with metadata older than was seen."""
        pinned = self.config.root.read_bytes()
        anchor = hashlib.sha256(pinned).hexdigest()
        before = self._floor()
        floor = before if before.root == anchor else Floor(root=anchor)
        self.prepare()
        verifier, self._verifier = self._verifier, None
        assert verifier is not None
        verdict = verifier.ask(Question(pinned, str(self.config.state_dir / "tuf"), module, version))
        if verdict.code:
            raise Refused(Code(verdict.code), verdict.reason, "see what the agent's log says of its trust")
        for role, found in verdict.versions.items():
            if found < (seen := floor.versions.get(role, 0)):
                said = f"the metadata of {role} has version {found}, and {seen} was seen here already"
                raise Refused(Code.TUF_INVALID, said)
        if verdict.sha256 != digest:
            said = f"{module} {version} was signed as {verdict.sha256[:12]}, not as {digest[:12]}"
            raise Refused(Code.PACKAGE_UNKNOWN, said)
        newest = Floor(root=anchor, versions={**floor.versions, **verdict.versions})
        if newest != before:
            _write(self.dir / "floor.json", msgspec.json.encode(newest))
        return verdict.signers

    def _floor(self) -> Floor:
        try:
            return msgspec.json.decode((self.dir / "floor.json").read_bytes(), type=Floor)
        except FileNotFoundError:
            return Floor()
        except msgspec.MsgspecError as error:
            raise Refused(
                Code.HOST_DISK, f"{self.dir / 'floor.json'} is damaged: {error}", "restore it"
            ) from None


def _seal_path(folder: Path) -> Path:
    return folder.with_name(folder.name + ".json")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sealed_dir(state_dir: Path) -> Path:
    """Where the copies are: beside the state directory, since the agent may write anywhere in that."""
    return state_dir.with_name(state_dir.name + ".sealed")


def is_digest(text: str) -> bool:
    """Whether this is a SHA-256 in lower-case hex, which is safe as a name."""
    return len(text) == 64 and all(c in "0123456789abcdef" for c in text)


def open_below(base: Path, *names: str) -> int:
    """A folder below `base`, opened name by name and following no link. Raises OSError."""
    at = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for name in names:
        try:
            inner = os.open(name, _FOLDER, dir_fd=at)
        finally:
            os.close(at)
        at = inner
    return at


def copy_tree(source: int, target: int, budget: list[int], depth: int = 0) -> None:
    """Copy what is below one folder into another, durably and following no link; nothing that no package holds.

    `budget` counts down files and bytes. Raises Refused(PACKAGE_UNSAFE_MEMBER | PACKAGE_TOO_LARGE), OSError.
    """
    if depth > package.MAX_DEPTH:
        raise Refused(Code.PACKAGE_UNSAFE_MEMBER, f"the tree is over {package.MAX_DEPTH} folders deep")
    for name in os.listdir(source):
        status = os.stat(name, dir_fd=source, follow_symlinks=False)
        budget[0] -= 1
        if stat.S_ISDIR(status.st_mode):
            os.mkdir(name, 0o755, dir_fd=target)
            inner, copy = os.open(name, _FOLDER, dir_fd=source), os.open(name, _FOLDER, dir_fd=target)
            try:
                copy_tree(inner, copy, budget, depth + 1)
            finally:
                os.close(inner)
                os.close(copy)
        else:
            data = _read(source, name, budget[1])
            budget[1] -= len(data)
            _put(target, name, data, stat.S_IMODE(status.st_mode) & 0o755)
        if budget[0] < 0:
            raise Refused(Code.PACKAGE_TOO_LARGE, f"the tree has more than {package.MAX_MEMBERS} files")
    os.fsync(target)


class Question(msgspec.Struct, frozen=True):
    """What a verifier is asked: the pinned root, where the agent keeps its metadata, and a release."""

    pinned: bytes
    metadata: str
    module: str
    version: str


class Verifier:
    """A child for one question, which has no power, cannot write, and ends in time. Its imports are done before it is asked."""

    def __init__(self) -> None:
        theirs_in, self._ask = os.pipe()
        self._hear, theirs_out = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._answer(theirs_in, theirs_out)
            finally:
                os._exit(1)
        os.close(theirs_in)
        os.close(theirs_out)

    def ask(self, question: Question) -> Verdict:
        """Its verdict; one that it did not give counts against the release. The child is gone afterwards."""
        try:
            with contextlib.suppress(BrokenPipeError), os.fdopen(self._ask, "wb") as out:
                out.write(msgspec.json.encode(question))
            with os.fdopen(self._hear, "rb") as answer:
                return msgspec.json.decode(answer.read(MAX_ANSWER + 1), type=Verdict)
        except msgspec.MsgspecError:
            return Verdict(code=Code.TUF_INVALID, reason="the metadata could not be checked in time")
        finally:
            os.waitpid(self.pid, 0)

    def alive(self) -> bool:
        """Whether it still waits; one that does not is cleared away."""
        if os.waitpid(self.pid, os.WNOHANG) == (0, 0):
            return True
        os.close(self._ask)
        os.close(self._hear)
        return False

    def _answer(self, questions: int, answers: int) -> None:
        for descriptor in (int(entry.name) for entry in Path("/proc/self/fd").iterdir()):
            if descriptor > 2 and descriptor not in (questions, answers):
                with contextlib.suppress(OSError):
                    os.close(descriptor)  # above all the agent's socket, which has to end with the spawner
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(WAIT_S)
        confine.die_with_parent(signal.SIGKILL)
        confine.keep_only((), ambient=False)
        confine.no_new_privileges()
        confine.fence(confine.Fence(alone=True))
        if (program := seccomp.program(frozenset())) is not None:
            confine.filter_calls(program)
        from loopback.host import chain  # python-tuf, which only this child ever loads

        with os.fdopen(questions, "rb") as file:
            data = file.read()
        if not data:
            return
        signal.alarm(VERIFY_S)
        question = msgspec.json.decode(data, type=Question)
        try:
            verdict = chain.check(question.pinned, Path(question.metadata), question.module, question.version)
        except Exception as error:
            verdict = Verdict(code=Code.TUF_INVALID, reason=f"the metadata does not verify: {error!r}"[:1000])
        with os.fdopen(answers, "wb") as out:
            out.write(msgspec.json.encode(verdict))


def _read(folder: int, name: str, most: int) -> bytes:
    with os.fdopen(os.open(name, _FLAGS, dir_fd=folder), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise Refused(Code.PACKAGE_UNSAFE_MEMBER, f"{name} is no plain file")
        data = file.read(most + 1)
    if len(data) > most:
        raise Refused(Code.PACKAGE_TOO_LARGE, f"the tree has more than {package.MAX_PACKAGE} bytes")
    return data


def _put(folder: int, name: str, data: bytes, mode: int) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    handle = os.open(name, flags, mode, dir_fd=folder)
    with os.fdopen(handle, "wb") as file:
        os.fchmod(handle, mode)
        file.write(data)
        file.flush()
        os.fsync(handle)


def _sync(folder: Path) -> None:
    handle = os.open(folder, _FOLDER)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write(path: Path, data: bytes) -> None:
    scratch = path.with_name(path.name + ".new")
    handle = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(handle)
    scratch.rename(path)
    _sync(path.parent)
