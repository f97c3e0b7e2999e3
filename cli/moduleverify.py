"""Every check of a package that can be made before it is trusted, one line each: `loopback module verify`."""

from __future__ import annotations

import asyncio
import hashlib
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

import msgspec

from loopback.cli import context, keys
from loopback.cli.main import explain, refusals
from loopback.contracts.abi import ABI_VERSION
from loopback.contracts.codes import Code, Refused
from loopback.trust import attest, package
from loopback.trust.capabilities import POWERS
from loopback.trust.manifest import Manifest
from loopback.trust.package import PackageInfo
from loopback.trust.repository import TargetInfo, TrustedRepository

Answer = Literal["ok", "no", "--"]

MAX_METADATA: Final = (
    1024 * 1024
)  # bytes of a file that is read from a mirror's folder; the client's own limits are lower
#: They differ wherever another file does: named only where no other is, the cause before what follows from it.
_DERIVED: Final = {attest.SBOM: 2, attest.PROVENANCE: 3, package.DIGESTS: 4}
_BYTE_CODE: Final = 1

#: Which line a refusal of the archive belongs to, and which checks held by then.
_ARCHIVE: Final = ("form", "names", "size", "contents", "manifest")
_STAGE: Final = {
    Code.PACKAGE_UNSAFE_MEMBER: "names",
    Code.PACKAGE_TOO_LARGE: "size",
    Code.PACKAGE_DIGEST: "contents",
    Code.MANIFEST_INVALID: "manifest",
    Code.MANIFEST_ABI: "manifest",
    Code.MANIFEST_CAPABILITY: "manifest",
}


class Check(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line. `code` and `next_step` where the answer is no; `--` says that it was not checked, and why."""

    name: str
    answer: Answer
    said: str
    code: str = ""
    next_step: str = ""


class Verification(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Everything that was found. `ok` says that no check failed; `unasked` that one could not be made though it was asked."""

    file: str
    ok: bool
    checks: tuple[Check, ...]
    module: str = ""
    version: str = ""
    digest: str = ""
    size: int = 0
    capabilities: dict[str, str] = {}
    described: attest.Described | None = None
    signers: tuple[str, ...] = ()
    unasked: bool = False


Find = Callable[[str, str], TargetInfo | None]


def verify(file: Path, find: Find | None, no_find: str, reproduce: Path | None = None) -> Verification:
    """Check a package. `find` asks a trusted repository for a module's release; `no_find` says why there is none.

    Raises Refused(PACKAGE_UNKNOWN) where there is no such file.
    """
    checks, info = _archive(file)
    if info is None:
        return Verification(file=str(file), ok=False, checks=tuple(checks))
    manifest = info.manifest
    checks += _manifest(manifest)
    about, described = _described(file, info)
    checks += about
    signature, signers, unasked = _signature(info, find, no_find)
    checks += signature
    if reproduce is not None:
        checks.append(_reproduced(file, info, described, reproduce))
    return Verification(
        file=str(file),
        ok=all(check.answer != "no" for check in checks),
        checks=tuple(checks),
        module=manifest.name,
        version=manifest.version,
        digest=info.digest,
        size=info.size,
        capabilities={name: POWERS[name] for name in manifest.module.capabilities},
        described=described,
        signers=signers,
        unasked=unasked,
    )


def _archive(file: Path) -> tuple[list[Check], PackageInfo | None]:
    try:
        info = package.inspect(file)
    except Refused as refused:
        if refused.code is Code.PACKAGE_UNKNOWN:
            raise
        stage = _STAGE.get(refused.code, "form")
        before = _ARCHIVE[: _ARCHIVE.index(stage)] if stage in ("contents", "manifest") else ()
        return [
            _no(name, refused)
            if name == stage
            else Check(name, "ok", "as it must be")
            if name in before
            else Check(name, "--", f"not looked at: {stage} is wrong already")
            for name in _ARCHIVE
        ], None
    longest = max(len(member.path) for member in info.members)
    manifest = info.manifest
    return [
        Check("form", "ok", "the one archive that there is for these files: no link, device, extension or hidden byte"),
        Check("names", "ok", f"{len(info.members)} plain files, all inside the folder, the longest name {longest} long"),
        Check("size", "ok", f"{info.size} bytes of at most {package.MAX_PACKAGE}, uncompressed: nothing can swell"),
        Check("contents", "ok", f"every file has the digest that {package.DIGESTS} says, none missing, none more"),
        Check("manifest", "ok", f"{manifest.name} {manifest.version}: {manifest.module.summary or 'no summary'}"),
    ], info  # fmt: skip


def _manifest(manifest: Manifest) -> list[Check]:
    low, high = manifest.module.abi
    try:
        manifest.require_abi()
        checks = [Check("abi", "ok", f"speaks {low} to {high}; this agent speaks {ABI_VERSION}")]
    except Refused as refused:
        checks = [_no("abi", refused)]
    needs, here = manifest.requires, platform.release()
    floor = f"Linux {needs.kernel} or newer" if needs.kernel else "any Linux"
    wants = f"{floor}{' with ' + ', '.join(needs.features) if needs.features else ''}"
    checks.append(Check("kernel", "ok", f"needs {wants}; every host compares its own (this machine: {here})"))
    if not manifest.module.capabilities:
        checks.append(Check("powers", "ok", "asks for no capability"))
    for name in manifest.module.capabilities:
        checks.append(Check("powers", "ok", f"asks for {name}: it may {POWERS[name]}"))
    return checks


def _described(file: Path, info: PackageInfo) -> tuple[list[Check], attest.Described | None]:
    def read(name: str) -> bytes:
        return package.read(file, info, name, most=attest.MAX_DOCUMENT)

    try:
        found = attest.check_sbom(info.digests, info.manifest, read)
    except Refused as refused:
        return [
            _no("sbom", refused),
            Check("provenance", "--", "not looked at: the SBOM is wrong already"),
        ], None
    libraries = ", ".join(f"{name} {wanted}".strip() for name, wanted in sorted(found.libraries.items()))
    said = f"{found.format}: {found.files} files, libraries: {libraries or 'none'}, license: {found.license or 'not said'}"
    checks = [Check("sbom", "ok", said)]
    try:
        found = attest.check_provenance(info.digests, info.manifest, read, found)
    except Refused as refused:
        return [*checks, _no("provenance", refused)], found
    tools = ", ".join(f"{name} {version}" for name, version in sorted(found.tools.items()))
    checks.append(
        Check(
            "provenance",
            "ok",
            f"built from {found.sources} sources with digest {found.source}, by {found.builder}",
        )
    )
    checks.append(Check("toolchain", "ok", f"{tools}; {found.headers} system headers, each with its digest"))
    if found.overlay:
        checks.append(
            Check("overlay", "ok", f"{len(found.overlay)} files were replaced for it: {found.overlay[0]} …")
        )
    return checks, found


def _signature(
    info: PackageInfo, find: Find | None, no_find: str
) -> tuple[list[Check], tuple[str, ...], bool]:
    digest = Check("digest", "ok", f"sha256 {info.digest}")
    if find is None:
        return [Check("signature", "--", no_find), digest], (), False
    manifest = info.manifest
    try:
        target = find(manifest.name, manifest.version)
    except Refused as refused:
        if refused.code in (Code.TUF_INVALID, Code.TUF_EXPIRED):
            return [_no("signature", refused), digest], (), False
        asked = Check("signature", "--", f"not checked: {refused.reason}", refused.code, refused.next_step)
        return [asked, digest], (), True
    if target is None:
        unsigned = Refused(
            Code.PACKAGE_UNKNOWN,
            f"nobody entitled to has signed {manifest.name} {manifest.version}",
            f"publish it with 'loopback module publish {manifest.name}-{manifest.version}.lbm'",
        )
        return [_no("signature", unsigned), digest], (), False
    if (target.sha256, target.length) != (info.digest, info.size):
        other = Refused(
            Code.PACKAGE_DIGEST,
            f"{manifest.name} {manifest.version} was signed as {target.sha256[:12]} of {target.length} bytes; "
            f"this is {info.digest[:12]} of {info.size}",
            "do not install it",
        )
        return [_no("signature", other), digest], target.signers, False
    return [
        Check("signature", "ok", f"signed for {target.path}"),
        Check("publisher", "ok", f"key {', '.join(target.signers)}"),
        digest,
    ], target.signers, False  # fmt: skip


def _reproduced(file: Path, info: PackageInfo, described: attest.Described | None, sources: Path) -> Check:
    from loopback.modules.build import pack  # only building needs the compiler's side

    try:
        data, manifest = pack(sources, version=info.manifest.version)
    except Refused as refused:
        return _no("reproduced", refused)
    if hashlib.sha256(data).hexdigest() == info.digest:
        return Check("reproduced", "ok", f"{sources} builds the same {len(data)} bytes")
    with tempfile.TemporaryDirectory(prefix="loopback-verify-") as folder:
        again = Path(folder) / file.name
        again.write_bytes(data)
        other = package.inspect(again)
        _, here = _described(again, other)
    said = _first_difference(info, other)
    if manifest.name != info.manifest.name:
        said = f"these are the sources of {manifest.name}"
    elif described is not None and described.overlay:
        said += f"; it was built with an overlay of {len(described.overlay)} files"
    elif described is not None and here is not None and described.tools != here.tools:
        names = sorted(
            n for n in {*described.tools, *here.tools} if described.tools.get(n) != here.tools.get(n)
        )
        said += "; built with other tools: " + ", ".join(
            f"{name} {described.tools.get(name, 'none')} there, {here.tools.get(name, 'none')} here"
            for name in names
        )
    differs = Refused(
        Code.PACKAGE_DIGEST,
        f"{sources} builds other bytes: {said}",
        "build from the same sources with the same tools before you conclude anything",
    )
    return _no("reproduced", differs)


def _first_difference(one: PackageInfo, other: PackageInfo) -> str:
    """The first member that differs, by name; those that follow from others come last."""
    left, right = one.digests, other.digests
    late = {name: _BYTE_CODE for name in left.keys() | right.keys() if name.endswith(".pyc")} | _DERIVED
    names = sorted(left.keys() | right.keys(), key=lambda name: (late.get(name, 0), name))
    for name in names:
        if name not in right:
            return f"{name} is in the package only"
        if name not in left:
            return f"{name} comes from the sources only"
        if left[name] != right[name]:
            return f"{name} differs first"
    return "only the order differs"


def _no(name: str, refused: Refused) -> Check:
    return Check(name, "no", refused.reason, refused.code, refused.next_step)


def offline(root: Path, metadata: Path) -> Find:
    """Asks a folder of TUF metadata, as a mirror or a client keeps it, trusting nothing but this root.

    Raises Refused(TUF_INVALID) where the root is none.
    """
    try:
        pinned = root.read_bytes()
    except OSError as error:
        raise Refused(
            Code.TUF_INVALID, f"the root {root} cannot be read: {error.strerror}", "name the pinned root.json"
        ) from None
    if not metadata.is_dir():
        raise Refused(
            Code.TUF_INVALID, f"there is no folder {metadata}", "name the folder with timestamp.json in it"
        )

    def find(module: str, version: str) -> TargetInfo | None:
        with tempfile.TemporaryDirectory(prefix="loopback-verify-") as folder:
            TrustedRepository.pin(Path(folder), pinned)
            return TrustedRepository(Path(folder), lambda name: _mirrored(metadata, name)).release(
                module, version
            )

    return find


def _mirrored(folder: Path, name: str) -> bytes | None:
    """A metadata file, under the name that a repository or that a client gives it; what it is worth, TUF decides."""
    if "/" in name or name.startswith("."):
        return None
    for path in (folder / name, folder / "root_history" / name, folder / name.partition(".")[2]):
        if path.is_file() and path.name != "root.json":
            with path.open("rb") as file:
                return file.read(MAX_METADATA)
    return None


def online() -> Find:
    """Asks this installation's repository, over the bus."""

    def find(module: str, version: str) -> TargetInfo | None:
        async def ask() -> TargetInfo | None:
            async with context.connect() as session:
                trusted = await keys.repository(session)
                return await asyncio.to_thread(trusted.release, module, version)

        try:
            return asyncio.run(ask())
        except Exception as error:
            if refused := refusals(error):
                raise refused[0] from None
            if (said := explain(error)) is None:
                raise
            raise Refused(
                Code.TUF_UNREACHABLE,
                said.partition("\n")[0].removeprefix("error: "),
                "start it with 'loopback up', or name --root and --metadata",
            ) from None

    return find
