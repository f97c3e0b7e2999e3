"""`module.toml`: what a module is, what it needs and what it may do.

[module]   name, version, summary, abi = [1, 1], entry, capabilities
[requires] kernel, features, architectures, agent, python, libraries
[limits]   memory_mib, tasks, stop_s
[health]   interval_s, grace_s
[build]    python, bpf, license: only for building; not in the package
"""

from __future__ import annotations

import json
import re
import tomllib
from typing import Any, Final

import msgspec
from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version

from loopback.contracts.abi import ABI_VERSION
from loopback.contracts.codes import Code, Refused
from loopback.contracts.messages import Requirements
from loopback.trust.capabilities import POWERS

MAX_MANIFEST: Final = 64 * 1024  # bytes
PYTHON: Final = "{python}"  # in `entry`: the agent's own interpreter

_NAME = re.compile(r"[a-z][a-z0-9-]{0,63}")
_KERNEL = re.compile(r"[0-9]{1,3}\.[0-9]{1,3}(\.[0-9]{1,3})?")
_WORD = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One table of the file."""


class ModuleTable(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`entry` is the argument list of its process; `abi` the versions of the module ABI it speaks, lowest and highest."""

    name: str
    version: str
    entry: tuple[str, ...]
    summary: str = ""
    abi: tuple[int, int] = (ABI_VERSION, ABI_VERSION)
    capabilities: tuple[str, ...] = ()


class RequiresTable(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`kernel` is the oldest one; `agent`, `python` and `libraries` are PEP 440 specifiers."""

    kernel: str = ""
    features: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    agent: str = ""
    python: str = ""
    libraries: dict[str, str] = {}


class LimitsTable(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the agent holds its process to; `stop_s` is how long a stop may take, in seconds."""

    memory_mib: int = 256
    tasks: int = 64
    stop_s: float = 5.0


class HealthTable(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """It is asked every `interval_s` seconds and has `grace_s` seconds from its start to answer."""

    interval_s: float = 5.0
    grace_s: float = 10.0


class BuildTable(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sources: Python files and folders of `loopback/` or of the module's own folder, eBPF programs of either.

    `license` is an SPDX expression, for the SBOM.
    """

    python: tuple[str, ...] = ()
    bpf: tuple[str, ...] = ()
    license: str = ""


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole `module.toml`."""

    module: ModuleTable
    requires: RequiresTable = RequiresTable()
    limits: LimitsTable = LimitsTable()
    health: HealthTable = HealthTable()
    build: BuildTable = BuildTable()

    @property
    def name(self) -> str:
        """The module's name."""
        return self.module.name

    @property
    def version(self) -> str:
        """The release's version."""
        return self.module.version

    def with_version(self, version: str) -> Manifest:
        """The same for another version. Raises Refused(MANIFEST_INVALID)."""
        found = msgspec.structs.replace(self, module=msgspec.structs.replace(self.module, version=version))
        _check(found, "--version")
        return found

    def requirements(self) -> Requirements:
        """What a host must offer, for the catalog."""
        return Requirements(
            abi_min=self.module.abi[0],
            abi_max=self.module.abi[1],
            kernel=self.requires.kernel,
            features=self.requires.features,
            architectures=self.requires.architectures,
            agent=self.requires.agent,
            capabilities=self.module.capabilities,
        )

    def require_abi(self, lowest: int = ABI_VERSION, highest: int = ABI_VERSION) -> None:
        """Raises Refused(MANIFEST_ABI) where the module speaks no ABI version between these."""
        low, high = self.module.abi
        if high < lowest or low > highest:
            raise Refused(
                Code.MANIFEST_ABI,
                f"module.toml: module.abi: {self.name} {self.version} speaks ABI {low} to {high}, this agent {lowest} to "
                f"{highest}",
                "update the agent, or build the module for its ABI",
            )

    def to_toml(self) -> bytes:
        """The file's bytes in one fixed form, without `[build]`, as packages hold it."""
        lines = []
        for table, values in msgspec.to_builtins(self).items():
            if table != "build":
                lines.append(f"[{table}]")
                lines += [f"{key} = {_toml(value)}" for key, value in values.items()]
                lines.append("")
        return "\n".join(lines).encode()


def parse(data: bytes, source: str = "module.toml") -> Manifest:
    """Read a manifest. Raises Refused(MANIFEST_INVALID | MANIFEST_ABI | MANIFEST_CAPABILITY) naming line or field."""
    if len(data) > MAX_MANIFEST:
        raise _invalid(source, f"{len(data)} bytes are more than the {MAX_MANIFEST} allowed")
    try:
        tables = tomllib.loads(data.decode())
    except UnicodeDecodeError as error:
        raise _invalid(source, f"not UTF-8 at byte {error.start}") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise _invalid(source, f"not TOML: {error}") from None
    try:
        found = msgspec.convert(tables, Manifest)
    except msgspec.ValidationError as error:
        said, _, place = str(error).partition(" - at `$")
        raise _invalid(source, f"{place.strip('.`') or 'top level'}: {said}") from None
    _check(found, source)
    return found


def check_module_name(name: str, source: str = "module") -> None:
    """Raises Refused(MANIFEST_INVALID) for what cannot name a module."""
    if not _NAME.fullmatch(name):
        raise _invalid(source, f"{name[:80]!r} is not a name of a-z, 0-9 and '-', up to 64 long")


def _check(found: Manifest, source: str) -> None:
    module, requires = found.module, found.requires
    check_module_name(module.name, f"{source}: module.name")
    try:
        normal = str(Version(module.version))
    except InvalidVersion:
        raise _invalid(
            source, f"module.version: {module.version[:80]!r} is not a version by PEP 440"
        ) from None
    if normal != module.version or not _WORD.fullmatch(module.version):
        raise _invalid(source, f"module.version: write {module.version[:80]!r} in its normal form {normal!r}")
    if not module.entry or any(not a or "\0" in a or len(a) > 1024 for a in module.entry):
        raise _invalid(source, "module.entry: it needs at least one argument, and none may be empty")
    low, high = module.abi
    if not 1 <= low <= high:
        raise Refused(
            Code.MANIFEST_ABI,
            f"{source}: module.abi: {low} to {high} is no range of ABI versions",
            f"write abi = [{ABI_VERSION}, {ABI_VERSION}]",
        )
    for capability in module.capabilities:
        if capability not in POWERS:
            raise Refused(
                Code.MANIFEST_CAPABILITY,
                f"{source}: module.capabilities: Linux knows no capability {capability[:60]!r}",
                "see capabilities(7)",
            )
    if requires.kernel and not _KERNEL.fullmatch(requires.kernel):
        raise _invalid(source, f"requires.kernel: {requires.kernel[:40]!r} is not a kernel version like 5.17")
    for field, words in (("features", requires.features), ("architectures", requires.architectures)):
        for word in words:
            if not _WORD.fullmatch(word):
                raise _invalid(source, f"requires.{field}: {word[:60]!r} is not a plain word")
    if found.build.license:
        try:
            expression = canonicalize_license_expression(found.build.license)
        except InvalidLicenseExpression:
            expression = None
        if expression != found.build.license:
            raise _invalid(
                source,
                f"build.license: {found.build.license[:80]!r} is no SPDX expression in its normal form",
            )
    ranges = {"agent": requires.agent, "python": requires.python}
    ranges |= {f"libraries.{name}": text for name, text in requires.libraries.items()}
    for field, text in ranges.items():
        try:
            SpecifierSet(text)
        except InvalidSpecifier:
            raise _invalid(
                source, f"requires.{field}: {text[:60]!r} is not a version range by PEP 440"
            ) from None
    for field, value, most in (
        ("limits.memory_mib", found.limits.memory_mib, 1024 * 1024),
        ("limits.tasks", found.limits.tasks, 65536),
        ("limits.stop_s", found.limits.stop_s, 300),
        ("health.interval_s", found.health.interval_s, 3600),
        ("health.grace_s", found.health.grace_s, 3600),
    ):
        if not 0 < value <= most:
            raise _invalid(source, f"{field}: {value} is not above 0 and at most {most}")


def _invalid(source: str, said: str) -> Refused:
    return Refused(Code.MANIFEST_INVALID, f"{source}: {said}", "see docs/module-author.md")


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(k)} = {_toml(v)}" for k, v in sorted(value.items())) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but TOML wants U+007F escaped and JSON leaves it
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
