"""Bringing a version onto the disk: download, verify, unpack; and checking it again before every start.

Nothing is unpacked before TUF, the desired state and the package's own digests agree, and nothing that is unpacked is
started before its tree was compared with what was unpacked.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.metadata
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from packaging.specifiers import SpecifierSet
from packaging.version import Version

import loopback
from loopback.contracts.codes import Code, Refused
from loopback.contracts.desired import Running
from loopback.contracts.messages import Policy
from loopback.contracts.reports import Phase
from loopback.contracts.trustdoc import Trust
from loopback.host import decide
from loopback.host.config import HostConfig
from loopback.host.inventory import kernel_version
from loopback.host.state import ModuleStore, Store
from loopback.trust import blobs, manifest, package
from loopback.trust.manifest import Manifest
from loopback.trust.repository import TrustedRepository

RETRIES_S: Final = (0.5, 2.0, 5.0)  # waits between attempts to fetch what is out of reach just now
_OUT_OF_REACH: Final = frozenset({Code.BLOB_MISSING, Code.TUF_UNREACHABLE})


async def fetch(
    get: blobs.Get, store: Store, target: Running, size: int, module: str, workspace: str, trust: Trust
) -> None:
    """Have the package and the policy of a target on disk; what is there already is not fetched again.

    Raises Refused: BLOB_*, PACKAGE_TOO_LARGE, HOST_DISK, and what `decide.check_policy` raises.
    """
    for wait in (*RETRIES_S, None):
        try:
            with plainly(store.dir):
                await _package(get, store, target, size, module)
                await _policy(get, store, target, module, workspace, trust)
            return
        except Refused as refused:
            if refused.code not in _OUT_OF_REACH or wait is None:
                raise
            await asyncio.sleep(wait)


async def _package(get: blobs.Get, store: Store, target: Running, size: int, module: str) -> None:
    path = store.download_path(target.package)
    if store.module(module).version_dir(target).is_dir() or path.is_file():
        return
    await blobs.download(
        get, target.package, max_size=package.MAX_PACKAGE, into=path, size=size or None
    )  # fmt: skip


async def _policy(
    get: blobs.Get, store: Store, target: Running, module: str, workspace: str, trust: Trust
) -> None:
    if target.policy is None or has_policy(store, target):
        return
    data = await blobs.read(get, target.policy)
    decide.check_policy(data, target, module, workspace, trust)
    store.disk.write(store.policy_path(target.policy), data)


def verify(
    repository: TrustedRepository, store: Store, target: Running, module: str, config: HostConfig, features: frozenset[str],
    *, kept: bool,
) -> Manifest:  # fmt: skip
    """Verify a target's package, unpacked already or just downloaded; its manifest. Blocking: call it in a thread.

    `kept` says that this host promoted exactly this before: then its own memory suffices, and a way back needs neither
    network nor unexpired metadata. Raises Refused: TUF_*, PACKAGE_*, MANIFEST_*, HOST_NOT_ALLOWED, KERNEL_UNSUPPORTED.
    """
    own = store.module(module)
    unpacked = own.version_dir(target)
    with plainly(unpacked):
        if not kept:
            _check_target(repository, target, module, store.download_path(target.package))
        if unpacked.is_dir():
            found = verify_unpacked(own, target)
        else:
            found = package.inspect(store.download_path(target.package), sha256=target.package).manifest
    if found.name != module or found.version != target.version:
        raise Refused(
            Code.PACKAGE_UNKNOWN,
            f"the package is {found.name} {found.version}, not {module} {target.version}",
        )
    check_requirements(found, config, features)
    return found


def _check_target(repository: TrustedRepository, target: Running, module: str, path: Path) -> None:
    try:
        repository.refresh()
    except Refused as refused:
        if refused.code is not Code.TUF_UNREACHABLE:
            raise
        repository.load()  # what was verified earlier still counts until it expires
    info = repository.release(module, target.version)
    if info is None:
        raise Refused(
            Code.PACKAGE_UNKNOWN,
            f"nobody entitled to has signed {module} {target.version}",
            "publish it with 'loopback module publish'",
        )
    if info.sha256 != target.package:
        raise Refused(
            Code.PACKAGE_DIGEST,
            f"{module} {target.version} was signed as {info.sha256[:12]}, not as {target.package[:12]}",
            "start the rollout again with the published package",
        )
    if path.is_file() and path.stat().st_size != info.length:
        raise Refused(
            Code.PACKAGE_DIGEST, f"the package has {path.stat().st_size} bytes, {info.length} were signed"
        )


def digests_of(store: Store, target: Running) -> str:
    """The digest of a downloaded package's `digests.json`. Blocking. Raises Refused(PACKAGE_*)."""
    with plainly(store.downloads):
        return package.inspect(store.download_path(target.package), sha256=target.package).digests


def unpack(store: Store, target: Running, module: str) -> None:
    """Unpack a verified package into its version folder, in one rename. Blocking.

    Raises Refused: PACKAGE_*, HOST_DISK.
    """
    own = store.module(module)
    final = own.version_dir(target)
    scratch = final.with_name(f".{final.name}.new")
    own.disk.folder(final.parent)
    own.disk.remove(scratch)
    with plainly(final):
        package.extract(store.download_path(target.package), scratch, sha256=target.package)
    own.disk.adopt(scratch, final)


def verify_unpacked(own: ModuleStore, target: Running) -> Manifest:
    """Compare an unpacked version with what was unpacked, and read its manifest. Blocking. Raises Refused(PACKAGE_*)."""
    folder = own.version_dir(target)
    digests = own.read().trees.get(target.package)
    if digests is None:
        raise Refused(
            Code.PACKAGE_DIGEST, f"{folder} was not unpacked by this agent", "have it rolled out again"
        )
    package.verify_tree(folder, digests=digests)
    path = folder / package.MANIFEST
    return manifest.parse(path.read_bytes(), str(path))


def has_policy(store: Store, target: Running) -> bool:
    """Whether the target's policy is on disk as its digest says; one that is damaged is fetched again. Blocking."""
    if target.policy is None:
        return False
    data = store.disk.read(store.policy_path(target.policy))
    return data is not None and hashlib.sha256(data).hexdigest() == target.policy


def check_policy(store: Store, target: Running, module: str, workspace: str, trust: Trust) -> None:
    """Verify a policy on disk as if it had just come: who was trusted when it came may not be trusted now. Blocking.

    Raises Refused like `decide.check_policy`.
    """
    if target.policy is None:
        return
    data = store.disk.read(store.policy_path(target.policy))
    if data is None:
        raise _gone(target.policy)
    decide.check_policy(data, target, module, workspace, trust)


def _gone(policy: str) -> Refused:
    return Refused(Code.POLICY_MALFORMED, f"the policy {policy[:12]} is not on disk any more")


def read_policy(store: Store, target: Running) -> Policy | None:
    """The policy of a target that was verified when it came; its digest is checked again. Raises Refused."""
    if target.policy is None:
        return None
    data = store.disk.read(store.policy_path(target.policy))
    if data is None:
        raise _gone(target.policy)
    return decide.kept_policy(data, target)


def check_requirements(found: Manifest, config: HostConfig, features: frozenset[str]) -> None:
    """Whether this host has what a module needs and its owner lets it have what it wants.

    Raises Refused: MANIFEST_ABI, MANIFEST_CAPABILITY, KERNEL_UNSUPPORTED, MODULE_START.
    """
    found.require_abi()
    for capability in found.module.capabilities:
        if capability not in config.allow.capabilities:
            raise Refused(
                Code.MANIFEST_CAPABILITY,
                f"{found.name} {found.version} asks for {capability}, which this host's owner does not allow",
                "add it to [allow] capabilities in host.toml there",
            )
    needs = found.requires
    kernel = platform.release()
    if needs.kernel and kernel_version(kernel) < kernel_version(needs.kernel):
        raise Refused(Code.KERNEL_UNSUPPORTED, f"kernel {kernel} is older than the {needs.kernel} it needs")
    if missing := sorted(set(needs.features) - features):
        raise Refused(Code.KERNEL_UNSUPPORTED, f"kernel {kernel} lacks {', '.join(missing)}")
    if needs.architectures and platform.machine() not in needs.architectures:
        raise Refused(
            Code.KERNEL_UNSUPPORTED,
            f"it is built for {', '.join(needs.architectures)}, not {platform.machine()}",
        )
    versions = {
        "agent": (loopback.__version__, needs.agent),
        "python": (platform.python_version(), needs.python),
    }
    for name, wanted in needs.libraries.items():
        try:
            versions[name] = (importlib.metadata.version(name), wanted)
        except importlib.metadata.PackageNotFoundError:
            raise Refused(
                Code.MODULE_START, f"it needs the library {name} {wanted}, which is not here"
            ) from None
    for name, (have, wanted) in versions.items():
        if not SpecifierSet(wanted, prereleases=True).contains(Version(have)):
            raise Refused(
                Code.MODULE_START, f"it needs {name} {wanted}, here is {have}", f"update {name} here"
            )


def collect(store: Store, module: str) -> None:
    """Sweep what no state names any more. Raises Refused(HOST_DISK)."""
    own = store.module(module)
    state = own.read()
    kept = {own.version_dir(r).name for r in (state.promoted, state.previous) if r is not None}
    for name in own.disk.names(own.folder / "versions"):
        if name not in kept:
            own.disk.remove(own.folder / "versions" / name)
    policies = set()
    packages: set[str] = set()
    for other in store.modules():
        known = store.module(other).read()
        policies |= {r.policy for r in (known.promoted, known.previous, known.target) if r is not None}
        if known.target is not None and (known.step or known.phase is Phase.REJECTED):
            packages.add(
                known.target.package
            )  # what arrived of it is gone on with when it is asked for again
    for name in store.disk.names(store.policies):
        if name.removesuffix(".json") not in policies:
            store.disk.remove(store.policies / name)
    for name in store.disk.names(store.downloads):
        if name.partition(".")[0] not in packages:
            store.disk.remove(store.downloads / name)


def command(found: Manifest, folder: Path) -> tuple[str, ...]:
    """The command line of an unpacked module; `{python}` is the agent's own interpreter, `bin/…` lies in the package."""
    argv = [sys.executable if a == manifest.PYTHON else a for a in found.module.entry]
    if argv[0].startswith("bin/"):
        argv[0] = str(folder / argv[0])
    return (shutil.which(argv[0]) or argv[0], *argv[1:])


@contextmanager
def plainly(path: Path) -> Iterator[None]:
    """Turn what disks and task groups raise into the one refusal behind it."""
    try:
        yield
    except TimeoutError:  # an OSError too, but not the disk's
        raise Refused(
            Code.BLOB_MISSING, f"the content for {path} did not arrive in time", "try again"
        ) from None
    except OSError as error:
        raise Refused(
            Code.HOST_DISK, f"{error.filename or path}: {error.strerror or error}", "free or repair the disk"
        ) from None
    except BaseExceptionGroup as group:
        refused, others = group.split(Refused)
        if refused is None or others is not None:
            raise
        first: BaseException = refused
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None
