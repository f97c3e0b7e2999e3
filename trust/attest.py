"""What a package says of itself: `sbom.cdx.json`, what is in it, and `provenance.json`, how it was made.

The SBOM is CycloneDX 1.6 in JSON: the module, every file with its SHA-256, the Python and the libraries that it requires.
The provenance is an in-toto Statement v1 with the SLSA provenance v1 predicate: every file's digest, the sources and system
headers that went in, and the exact versions of the tools. Both are a function of files, sources and tools alone: no time, no
random number, no name of a machine or person. They are as trustworthy as the release's signature, which covers them.

`describe` makes them, `check` compares them with the package that holds them. Publishing demands them, a host does not.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

import msgspec

import loopback
from loopback.contracts.codes import Code, Refused
from loopback.contracts.decoding import Decoder
from loopback.trust.manifest import Manifest

SBOM: Final = "sbom.cdx.json"
PROVENANCE: Final = "provenance.json"
MAX_DOCUMENT: Final = 1024 * 1024  # bytes of one of them; 2000 files of 200 bytes' names take about 600 KiB
BUILD_TYPE: Final = "urn:loopback-modules:build:module:v1"  # described in docs/module-author.md
BUILDER: Final = "urn:loopback-modules:builder:loopback-module-build"
STATEMENT: Final = "https://in-toto.io/Statement/v1"
PREDICATE: Final = "https://slsa.dev/provenance/v1"

#: Files that no document can name: itself, or what is made after it.
_LAST: Final = frozenset({PROVENANCE, "digests.json"})
_NAMESPACE: Final = uuid.uuid5(uuid.NAMESPACE_URL, BUILD_TYPE)
_SOURCE: Final = "source"
_NEW_BUILD: Final = "build the package again with 'loopback module build'"

_T = TypeVar("_T")


class Build(msgspec.Struct, frozen=True, kw_only=True):
    """What went into a package. `sources` and `headers` map names to SHA-256 in hex, `tools` to exact versions.

    `overlay` names the files of the package that were replaced for an experiment; `license` is an SPDX expression.
    """

    sources: dict[str, str]
    tools: dict[str, str]
    headers: dict[str, str] = {}
    flags: tuple[str, ...] = ()
    overlay: tuple[str, ...] = ()
    license: str = ""


class Described(msgspec.Struct, frozen=True, kw_only=True):
    """What both documents say, compared with the package. `source` is the digest over all sources, in hex."""

    format: str
    serial: str
    files: int
    libraries: dict[str, str]
    license: str
    builder: str
    build_type: str
    source: str
    sources: int
    headers: int
    tools: dict[str, str]
    overlay: tuple[str, ...]


def source_digest(sources: Mapping[str, str]) -> str:
    """SHA-256, in hex, over the sources: of the lines that `sha256sum` prints for them, in the order of their names."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(sources.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def describe(digests: Mapping[str, str], manifest: Manifest, build: Build) -> dict[str, bytes]:
    """Both documents of a package whose files have these digests (path → SHA-256, `module.toml` among them)."""
    sbom = _sbom(digests, manifest, build)
    subjects = {**digests, SBOM: hashlib.sha256(sbom).hexdigest()}
    return {SBOM: sbom, PROVENANCE: _provenance(subjects, manifest, build)}


def _sbom(digests: Mapping[str, str], manifest: Manifest, build: Build) -> bytes:
    reference = f"pkg:generic/{manifest.name}@{manifest.version}"
    module: dict[str, Any] = {
        "type": "application",
        "bom-ref": reference,
        "name": manifest.name,
        "version": manifest.version,
        "purl": reference,
    }
    if manifest.module.summary:
        module["description"] = manifest.module.summary
    if build.license:
        module["licenses"] = [{"expression": build.license}]
    files = [
        {
            "type": "file",
            "bom-ref": f"file:{path}",
            "name": path,
            "hashes": [{"alg": "SHA-256", "content": digest}],
        }
        for path, digest in sorted(digests.items())
    ]
    needs = manifest.requires
    required = {
        f"pkg:pypi/{name.lower()}": (name, wanted) for name, wanted in sorted(needs.libraries.items())
    }
    libraries = [
        {"type": "library", "bom-ref": purl, "name": name, "purl": purl, **_wanted(wanted)}
        for purl, (name, wanted) in required.items()
    ]
    platforms = [
        {"type": "platform", "bom-ref": f"platform:{name}", "name": name, **_wanted(wanted)}
        for name, wanted in (("linux", f">={needs.kernel}" if needs.kernel else ""), ("python", needs.python))
        if wanted
    ]
    found: dict[str, Any] = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "lifecycles": [{"phase": "build"}],
            "tools": {
                "components": [{"type": "application", "name": "loopback", "version": loopback.__version__}]
            },
            "component": module,
        },
        "components": [*files, *libraries, *platforms],
        "dependencies": [
            {"ref": reference, "dependsOn": [c["bom-ref"] for c in (*files, *libraries, *platforms)]}
        ],
    }
    # The same content has the same number, another content another one.
    found["serialNumber"] = uuid.uuid5(_NAMESPACE, json.dumps(found, sort_keys=True)).urn
    return _encode(found)


def _wanted(text: str) -> dict[str, Any]:
    """A range of versions; CycloneDX 1.6 has no field for one."""
    return {"properties": [{"name": "loopback:requires", "value": text}]}


def _provenance(digests: Mapping[str, str], manifest: Manifest, build: Build) -> bytes:
    def inputs(kind: str, found: Mapping[str, str]) -> list[dict[str, Any]]:
        return [{"name": f"{kind}/{name}", "digest": {"sha256": d}} for name, d in sorted(found.items())]

    tools = [
        {"name": name, "uri": f"pkg:generic/{name}", "annotations": {"version": version}}
        for name, version in sorted(build.tools.items())
    ]
    return _encode(
        {
            "_type": STATEMENT,
            "subject": [{"name": path, "digest": {"sha256": d}} for path, d in sorted(digests.items())],
            "predicateType": PREDICATE,
            "predicate": {
                "buildDefinition": {
                    "buildType": BUILD_TYPE,
                    "externalParameters": {
                        "module": manifest.name,
                        "version": manifest.version,
                        "overlay": list(build.overlay),
                    },
                    "internalParameters": {"flags": list(build.flags)},
                    "resolvedDependencies": [
                        {"name": _SOURCE, "digest": {"sha256": source_digest(build.sources)}},
                        *inputs(_SOURCE, build.sources),
                        *inputs("header", build.headers),
                        *tools,
                    ],
                },
                "runDetails": {
                    "builder": {"id": BUILDER, "version": {"loopback": loopback.__version__}},
                },
            },
        }
    )


def _encode(document: dict[str, Any]) -> bytes:
    return json.dumps(document, indent=1, sort_keys=True).encode() + b"\n"


# Reading: only what is compared is typed; both formats allow more.


class _Hash(msgspec.Struct, frozen=True):
    alg: str
    content: str


class _License(msgspec.Struct, frozen=True):
    expression: str = ""


class _Property(msgspec.Struct, frozen=True):
    name: str
    value: str = ""


class _Component(msgspec.Struct, frozen=True):
    type: str
    name: str
    version: str = ""
    hashes: tuple[_Hash, ...] = ()
    licenses: tuple[_License, ...] = ()
    properties: tuple[_Property, ...] = ()


class _BomMetadata(msgspec.Struct, frozen=True):
    component: _Component


class _Bom(msgspec.Struct, frozen=True):
    bomFormat: str
    specVersion: str
    serialNumber: str
    metadata: _BomMetadata
    components: tuple[_Component, ...]


class _Resource(msgspec.Struct, frozen=True):
    name: str = ""
    digest: dict[str, str] = {}
    annotations: dict[str, str] = {}


class _Definition(msgspec.Struct, frozen=True):
    buildType: str
    externalParameters: dict[str, Any]
    resolvedDependencies: tuple[_Resource, ...]


class _Builder(msgspec.Struct, frozen=True):
    id: str


class _Run(msgspec.Struct, frozen=True):
    builder: _Builder


class _Predicate(msgspec.Struct, frozen=True):
    buildDefinition: _Definition
    runDetails: _Run


class _Statement(msgspec.Struct, frozen=True):
    type_: str = msgspec.field(name="_type")
    subject: tuple[_Resource, ...]
    predicateType: str
    predicate: _Predicate


_BOM = Decoder(msgspec.json.Decoder(_Bom))
_STATEMENT = Decoder(msgspec.json.Decoder(_Statement))


def check(digests: Mapping[str, str], manifest: Manifest, read: Callable[[str], bytes]) -> Described:
    """Whether a package has both documents and they are about exactly its files; what they say.

    `digests` is path → SHA-256 of every file of the package, `read` brings one's content.
    Raises Refused: PACKAGE_SBOM, PACKAGE_PROVENANCE.
    """
    sbom = check_sbom(digests, manifest, read)
    return check_provenance(digests, manifest, read, sbom)


def check_sbom(digests: Mapping[str, str], manifest: Manifest, read: Callable[[str], bytes]) -> Described:
    """The first half of `check`. Raises Refused(PACKAGE_SBOM)."""
    code = Code.PACKAGE_SBOM
    bom = _read(SBOM, _BOM, code, digests, read)
    if bom.bomFormat != "CycloneDX" or bom.specVersion not in ("1.5", "1.6"):
        raise _wrong(code, f"{SBOM} is {bom.bomFormat[:40]} {bom.specVersion[:40]}, not CycloneDX 1.5 or 1.6")
    root = bom.metadata.component
    if (root.name, root.version) != (manifest.name, manifest.version):
        raise _wrong(code, f"{SBOM} is about {root.name[:80]} {root.version[:80]}")
    listed = [
        (c.name, next((h.content for h in c.hashes if h.alg == "SHA-256"), ""))
        for c in bom.components
        if c.type == "file"
    ]
    _compare(code, SBOM, listed, digests, _LAST | {SBOM})
    libraries = {
        c.name: next((p.value for p in c.properties if p.name == "loopback:requires"), "")
        for c in bom.components
        if c.type == "library"
    }
    if missing := sorted(manifest.requires.libraries.keys() - libraries.keys()):
        raise _wrong(code, f"{SBOM} does not name the library {missing[0]}, which the manifest requires")
    return Described(
        format=f"CycloneDX {bom.specVersion}",
        serial=bom.serialNumber,
        files=len(listed),
        libraries=libraries,
        license=root.licenses[0].expression if root.licenses else "",
        builder="",
        build_type="",
        source="",
        sources=0,
        headers=0,
        tools={},
        overlay=(),
    )


def check_provenance(
    digests: Mapping[str, str], manifest: Manifest, read: Callable[[str], bytes], sbom: Described
) -> Described:
    """The second half of `check`, added to what the first one found. Raises Refused(PACKAGE_PROVENANCE)."""
    code = Code.PACKAGE_PROVENANCE
    statement = _read(PROVENANCE, _STATEMENT, code, digests, read)
    if statement.type_ != STATEMENT or statement.predicateType != PREDICATE:
        raise _wrong(code, f"{PROVENANCE} is no in-toto Statement v1 about SLSA provenance v1")
    subjects = [(s.name, s.digest.get("sha256", "")) for s in statement.subject]
    _compare(code, PROVENANCE, subjects, digests, _LAST)
    definition = statement.predicate.buildDefinition
    parameters = definition.externalParameters
    if (parameters.get("module"), parameters.get("version")) != (manifest.name, manifest.version):
        raise _wrong(code, f"{PROVENANCE} is about another module or version")
    builder = statement.predicate.runDetails.builder.id
    if not builder or not definition.buildType:
        raise _wrong(code, f"{PROVENANCE} does not say who built it, or how")
    named: dict[str, dict[str, str]] = {_SOURCE: {}, "header": {}}
    whole, tools = "", {}
    for resource in definition.resolvedDependencies:
        kind, slash, name = resource.name.partition("/")
        if resource.name == _SOURCE:
            whole = resource.digest.get("sha256", "")
        elif slash and kind in named:
            named[kind][name] = resource.digest.get("sha256", "")
        elif "version" in resource.annotations:
            tools[resource.name] = resource.annotations["version"]
    sources = named[_SOURCE]
    if not sources or whole != source_digest(sources):
        raise _wrong(code, f"{PROVENANCE}: the digest over the sources is not that of the sources it names")
    if "python" not in tools:
        raise _wrong(code, f"{PROVENANCE} does not say with which Python it was built")
    overlay = parameters.get("overlay", [])
    return msgspec.structs.replace(
        sbom,
        builder=builder,
        build_type=definition.buildType,
        source=whole,
        sources=len(sources),
        headers=len(named["header"]),
        tools=tools,
        overlay=tuple(str(name) for name in overlay) if isinstance(overlay, list) else (),
    )


def _read(
    name: str, decoder: Decoder[_T], code: Code, digests: Mapping[str, str], read: Callable[[str], bytes]
) -> _T:
    if name not in digests:
        raise Refused(code, f"the package has no {name}", _NEW_BUILD)
    try:
        return decoder.decode(read(name))
    except (msgspec.MsgspecError, RecursionError) as error:
        raise _wrong(code, f"{name}: {error}") from None


def _compare(
    code: Code,
    document: str,
    pairs: list[tuple[str, str]],
    digests: Mapping[str, str],
    left_out: frozenset[str],
) -> None:
    """The document lists exactly the package's files, with their digests."""
    listed = dict(pairs)
    if len(listed) != len(pairs):
        raise _wrong(code, f"{document} lists a file twice")
    files = {name: digest for name, digest in digests.items() if name not in left_out}
    if listed == files:
        return
    name = min(n for n in listed.keys() | files.keys() if listed.get(n) != files.get(n))
    said = (
        "is not listed"
        if name not in listed
        else "is listed but not there"
        if name not in files
        else "has another digest there"
    )
    raise _wrong(code, f"{document}: {name[:200]} {said}")


def _wrong(code: Code, said: str) -> Refused:
    return Refused(code, said, _NEW_BUILD)
