"""Bringing a version onto the disk: download, verify, unpack; and checking it again before every start.

Nothing is unpacked before TUF, the desired state and the package's own digests agree, and nothing that is unpacked is
started before the archive's digest was computed again from its files.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.metadata
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import loopback
from loopback.contracts import envelope
from loopback.contracts.codes import Code, Refused
from loopback.contracts.desired import Running
from loopback.contracts.messages import Policy
from loopback.contracts.reports import Phase
from loopback.contracts.trustdoc import Trust, WorkspaceRules
from loopback.host import contents, policies
from loopback.host.config import HostConfig
from loopback.host.inventory import kernel_version
from loopback.host.publishers import check_publishers
from loopback.host.state import ModuleStore, Store
from loopback.trust import blobs, manifest, package, tree
from loopback.trust.manifest import Manifest
from loopback.trust.repository import TrustedRepository

RETRIES_S: Final = (0.5, 2.0, 5.0)  # waits between attempts to fetch what is out of reach just now
_OUT_OF_REACH: Final = frozenset({Code.BLOB_MISSING, Code.TUF_UNREACHABLE})


async def fetch(
    get: blobs.Get, store: Store, target: Running, size: int, module: str, workspace: str, trust: Trust
) -> None:
    """Have the package and the policy of a target on disk; what is there already is not fetched again.

    Raises Refused: BLOB_*, PACKAGE_TOO_LARGE, HOST_DISK, and what `policies.check_policy` raises.
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
    """The signed policy first: what it says is how much content there is to fetch, if any."""
    if target.policy is None:
        return
    data = store.disk.read(store.policy_path(target.policy))
    if data is not None and hashlib.sha256(data).hexdigest() == target.policy:
        policy = policies.kept_policy(data, target)
    else:  # never had, or damaged
        data = await blobs.read(get, target.policy, max_size=envelope.MAX_ENVELOPE)
        policy = policies.check_policy(data, target, module, workspace, trust)
        store.disk.write(store.policy_path(target.policy), data)
    if policy.blob is not None:
        await contents.fetch(get, store, policy.blob)


class Verified(msgspec.Struct, frozen=True):
    """A package that may run here: its manifest, and the ids of the keys that signed its release."""

    manifest: Manifest
    signers: tuple[str, ...]


def verify(
    repository: TrustedRepository, store: Store, target: Running, module: str, config: HostConfig, features: frozenset[str],
    rules: WorkspaceRules, *, kept: bool,
) -> Verified:  # fmt: skip
    """Verify a target's package, unpacked already or just downloaded. Blocking: call it in a thread.

    `kept` says that this host promoted exactly this before: then its own memory suffices, and a way back needs neither
    network nor unexpired metadata, and no rule of the workspace is asked: what was promoted here is never refused on its way
    back because a publisher was unpinned since. `floors.noncompliant` says so of it. The owner's own list is asked always.
    Raises Refused: TUF_*, PACKAGE_*, MANIFEST_*, HOST_NOT_ALLOWED, HOST_PUBLISHER, KERNEL_UNSUPPORTED.
    """
    own = store.module(module)
    unpacked = own.version_dir(target)
    with plainly(unpacked):
        if kept:
            signers = own.read().signers.get(target.package, ())
        else:
            signers = _check_target(repository, target, module, store.download_path(target.package))
        if unpacked.is_dir():
            found = verify_unpacked(own, target)
        else:
            found = package.inspect(store.download_path(target.package), sha256=target.package).manifest
    if found.name != module or found.version != target.version:
        raise Refused(
            Code.PACKAGE_UNKNOWN,
            f"the package is {found.name} {found.version}, not {module} {target.version}",
        )
    check_allowed(found, signers, config, None if kept else rules)
    check_requirements(found, features)
    return Verified(found, signers)


def _check_target(repository: TrustedRepository, target: Running, module: str, path: Path) -> tuple[str, ...]:
    """Whether TUF says the same of a target as the desired state; who signed it."""
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
    return info.signers


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


def verify_unpacked(own: ModuleStore, running: Running) -> Manifest:
    """Compare an unpacked version with the digest that was signed for it, and read its manifest. Blocking.

    Raises Refused: PACKAGE_*, MANIFEST_*, HOST_DISK.
    """
    folder = own.version_dir(running)
    path = folder / package.MANIFEST
    with plainly(folder):
        tree.verify(folder, sha256=running.package)
        return manifest.parse(path.read_bytes(), str(path))


def has_policy(store: Store, target: Running) -> bool:
    """Whether the target's policy is on disk as its digest says; one that is damaged is fetched again. Blocking."""
    try:
        return policy_content(store, target) is not None
    except Refused as refused:
        if refused.code is Code.HOST_DISK:
            raise
        return False


def check_policy(store: Store, target: Running, module: str, workspace: str, trust: Trust) -> None:
    """Verify a policy on disk as if it had just come: who was trusted when it came may not be trusted now. Blocking.

    Raises Refused like `policies.check_policy`, and like `policy_content`.
    """
    if target.policy is not None:
        policy = policies.check_policy(_kept(store, target), target, module, workspace, trust)
        _content(store, target, policy)


def policy_content(store: Store, target: Running) -> bytes | None:
    """What a module is given of a policy that was verified when it came; None where the target has none. Blocking.

    Every digest is checked again. Raises Refused: POLICY_MALFORMED where it is not on disk any more, BLOB_DIGEST where it is
    damaged, HOST_DISK.
    """
    if target.policy is None:
        return None
    return _content(store, target, policies.kept_policy(_kept(store, target), target))


def read_policy(store: Store, target: Running) -> Policy:
    """The policy of a target that has one, as it was signed and verified when it came. Blocking.

    Raises Refused: POLICY_MALFORMED, HOST_DISK.
    """
    return policies.kept_policy(_kept(store, target), target)


def _kept(store: Store, target: Running) -> bytes:
    assert target.policy is not None
    data = store.disk.read(store.policy_path(target.policy))
    if data is None:
        raise Refused(Code.POLICY_MALFORMED, f"the policy {target.policy[:12]} is not on disk any more")
    return data


def _content(store: Store, target: Running, policy: Policy) -> bytes:
    if policy.blob is None:
        return bytes(policy.content)
    data = contents.read(store, policy.blob)
    if data is None:
        raise Refused(
            Code.BLOB_DIGEST,
            f"the content of policy {(target.policy or '')[:12]} is not on disk as its digest says",
            "have it rolled out again",
        )
    return data


def check_allowed(
    found: Manifest, signers: tuple[str, ...], config: HostConfig, rules: WorkspaceRules | None = None
) -> None:
    """Whether the machine's owner lets this run (capabilities and publishers of host.toml), and, where `rules` are given, the
    workspace as well: one key on both lists must have signed it.

    Raises Refused: MANIFEST_CAPABILITY, HOST_NOT_ALLOWED, HOST_PUBLISHER.
    """
    what = f"{found.name} {found.version}"
    for capability in found.module.capabilities:
        if capability not in config.allow.capabilities:
            raise Refused(
                Code.MANIFEST_CAPABILITY,
                f"{what} asks for {capability}, which this host's owner does not allow",
                "add it to [allow] capabilities in host.toml there",
            )
    pinned = rules.publishers.get(found.name) if rules else None
    check_publishers(
        signers, config.allow.publishers, pinned, rules is not None and rules.regulated, what=what
    )


def check_requirements(found: Manifest, features: frozenset[str]) -> None:
    """Whether this host has what a module needs.

    Raises Refused: MANIFEST_ABI, KERNEL_UNSUPPORTED, MODULE_START.
    """
    found.require_abi()
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
    # What is there is listed before it is asked who needs it: another module's download may begin meanwhile.
    found = [
        (folder, name)
        for folder in (store.contents, store.policies, store.downloads)
        for name in store.disk.names(folder)
    ]
    needed: set[str] = set()
    for other in store.modules():
        known = store.module(other).read()
        for running in (known.promoted, known.previous, known.target):
            needed |= _named(store, running)
        if known.target is not None and (known.step or known.phase is Phase.REJECTED):
            needed.add(known.target.package)  # what arrived of it is gone on with when it is asked for again
    for folder, name in found:
        if name.partition(".")[0] not in needed:
            store.disk.remove(folder / name)


def _named(store: Store, running: Running | None) -> set[str]:
    """A policy's digest, and that of its content."""
    if running is None or running.policy is None:
        return set()
    try:
        blob = policies.kept_policy(_kept(store, running), running).blob
    except Refused as refused:
        if refused.code is Code.HOST_DISK:
            raise  # nobody knows what it names: nothing is swept
        blob = None
    return {running.policy} | ({blob.sha256} if blob is not None else set())


@contextmanager
def plainly(path: Path) -> Iterator[None]:
    """Turn what disks and deadlines raise into a refusal."""
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
