"""SBOM and provenance: right by their published formats, about exactly the files they lie beside, and refused otherwise."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from support_trust import described, manifest

from loopback.contracts.codes import Code, Refused
from loopback.trust import attest, package
from loopback.trust.attest import PROVENANCE, SBOM
from loopback.trust.manifest import Manifest, RequiresTable

FILES = {"lib/tiny.py": b"x = 1\n", "bin/run": b"#!/bin/sh\n"}
NEEDS = RequiresTable(python=">=3.11", kernel="5.18", libraries={"msgspec": ">=0.19", "PyYAML": ">=6"})
MADE = msgspec.structs.replace(manifest("tiny"), requires=NEEDS)


def written(folder: Path, data: bytes) -> tuple[Path, package.PackageInfo]:
    path = folder / "p.lbm"
    path.write_bytes(data)
    return path, package.inspect(path)


def documents(folder: Path, data: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    path, info = written(folder, data)
    sbom, provenance = (
        json.loads(package.read(path, info, n, most=attest.MAX_DOCUMENT)) for n in (SBOM, PROVENANCE)
    )
    return sbom, provenance


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("files", [FILES, {}, {f"lib/f{n}.py": b"" for n in range(300)}])
def test_the_sbom_is_cyclonedx_by_its_published_schema(tmp_path: Path, files: dict[str, bytes]) -> None:
    sbom, _ = documents(tmp_path, described(files, MADE, license="Apache-2.0 OR MIT"))
    wrong = JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(sbom))
    assert wrong is None, str(wrong)[:500]
    spoilt = json.dumps(sbom | {"serialNumber": "1"})
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(spoilt) is not None, "the validator looks"


def test_the_sbom_names_the_module_every_file_and_what_it_requires(tmp_path: Path) -> None:
    sbom, _ = documents(tmp_path, described(FILES, MADE, license="Apache-2.0"))
    root = sbom["metadata"]["component"]
    assert (root["name"], root["version"], root["purl"]) == ("tiny", "1.0.0", "pkg:generic/tiny@1.0.0")
    assert root["licenses"] == [{"expression": "Apache-2.0"}]
    files = {c["name"]: c["hashes"] for c in sbom["components"] if c["type"] == "file"}
    wanted = {n: sha(d) for n, d in {**FILES, "module.toml": MADE.to_toml()}.items()}
    assert files == {n: [{"alg": "SHA-256", "content": d}] for n, d in wanted.items()}
    others = {c["name"]: c["properties"][0]["value"] for c in sbom["components"] if c["type"] != "file"}
    assert others == {"msgspec": ">=0.19", "PyYAML": ">=6", "python": ">=3.11", "linux": ">=5.18"}
    (depends,) = sbom["dependencies"]
    assert depends["ref"] == root["bom-ref"]
    assert sorted(depends["dependsOn"]) == sorted(c["bom-ref"] for c in sbom["components"])


def test_the_provenance_is_an_in_toto_statement_with_slsas_predicate(tmp_path: Path) -> None:
    """Field by field against in-toto Statement v1 and SLSA provenance v1: what is required, and of which type."""
    _, statement = documents(tmp_path, described(FILES, MADE, headers={"linux/bpf.h": "c" * 64}))
    assert statement.keys() == {"_type", "subject", "predicateType", "predicate"}
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == "https://slsa.dev/provenance/v1"
    assert all(
        s.keys() == {"name", "digest"} and s["digest"].keys() == {"sha256"} for s in statement["subject"]
    )
    assert len({s["name"] for s in statement["subject"]}) == len(statement["subject"])
    predicate = statement["predicate"]
    assert predicate.keys() == {"buildDefinition", "runDetails"}
    definition = predicate["buildDefinition"]
    assert definition.keys() == {
        "buildType", "externalParameters", "internalParameters", "resolvedDependencies"
    }  # fmt: skip
    assert definition["buildType"].partition(":")[1], "a URI"
    assert isinstance(definition["externalParameters"], dict)
    for resource in definition["resolvedDependencies"]:
        assert resource.keys() <= {
            "name",
            "uri",
            "digest",
            "content",
            "downloadLocation",
            "mediaType",
            "annotations",
        }
        assert resource.keys() & {"uri", "digest", "content"}, "a ResourceDescriptor has one of these"
    assert predicate["runDetails"]["builder"].keys() == {"id", "version"}
    subjects = {s["name"] for s in statement["subject"]}
    assert subjects == {*FILES, "module.toml", SBOM}


def test_the_digest_over_the_sources_is_what_sha256sum_says_of_them(tmp_path: Path) -> None:
    found = attest.check(*checked(tmp_path, described(FILES, MADE)))
    lines = "".join(f"{sha(FILES[n])}  {n}\n" for n in sorted(FILES))
    assert found.source == sha(lines.encode())
    assert (found.sources, found.tools, found.files) == (2, {"python": "3.11.2"}, 3)


def checked(folder: Path, data: bytes) -> tuple[dict[str, str], Manifest, Callable[[str], bytes]]:
    path, info = written(folder, data)
    return info.digests, info.manifest, lambda n: package.read(path, info, n, most=attest.MAX_DOCUMENT)


def test_the_serial_number_follows_from_the_content_alone(tmp_path: Path) -> None:
    first, again, other = (
        documents(tmp_path, described(files, MADE))[0]["serialNumber"]
        for files in (FILES, dict(reversed(FILES.items())), FILES | {"lib/tiny.py": b"x = 2\n"})
    )
    assert first == again != other
    assert first.startswith("urn:uuid:")


def test_no_name_of_a_machine_or_person_and_no_time_is_in_it(tmp_path: Path) -> None:
    sbom, provenance = documents(tmp_path, described(FILES, MADE))
    assert "timestamp" not in sbom["metadata"]
    assert "authors" not in sbom["metadata"]
    assert "metadata" not in provenance["predicate"]["runDetails"]


def spoilt(name: str, change: Callable[[dict[str, Any]], object]) -> bytes:
    """A canonical package whose document of this name was changed by whoever built it."""
    digests = {n: sha(d) for n, d in {**FILES, "module.toml": MADE.to_toml()}.items()}
    sources = {n: sha(d) for n, d in FILES.items()}
    made = attest.describe(digests, MADE, attest.Build(sources=sources, tools={"python": "3.11.2"}))
    content = json.loads(made[name])
    change(content)
    return package.build({**FILES, **made, name: json.dumps(content).encode()}, MADE)


def component(content: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(c for c in content["components"] if c["name"] == name)
    return found


def resolved(content: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = content["predicate"]["buildDefinition"]["resolvedDependencies"]
    return found


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        (SBOM, lambda c: c.update(bomFormat="SPDX"), "SPDX 1.6, not CycloneDX"),
        (SBOM, lambda c: c.update(specVersion="1.2"), "CycloneDX 1.2"),
        (SBOM, lambda c: c["metadata"]["component"].update(version="9"), "about tiny 9"),
        (SBOM, lambda c: c["components"].pop(0), "bin/run is not listed"),
        (SBOM, lambda c: c["components"].append(component(c, "bin/run")), "lists a file twice"),
        (
            SBOM,
            lambda c: component(c, "bin/run")["hashes"][0].update(content="0" * 64),
            "bin/run has another",
        ),
        (SBOM, lambda c: component(c, "bin/run")["hashes"][0].update(alg="MD5"), "bin/run has another"),
        (SBOM, lambda c: component(c, "bin/run").update(name="bin/gone"), "bin/gone is listed but not there"),
        (SBOM, lambda c: component(c, "PyYAML").update(name="other"), "does not name the library PyYAML"),
        (SBOM, lambda c: c.update(components=7), "components"),
        (PROVENANCE, lambda c: c.update(_type="x"), "no in-toto Statement"),
        (PROVENANCE, lambda c: c.update(predicateType="x"), "no in-toto Statement"),
        (PROVENANCE, lambda c: c["subject"].pop(), "is not listed"),
        (PROVENANCE, lambda c: c["subject"][0]["digest"].update(sha256="0" * 64), "has another digest"),
        (PROVENANCE, lambda c: resolved(c).pop(1), "digest over the sources"),
        (PROVENANCE, lambda c: resolved(c)[0]["digest"].update(sha256="0" * 64), "digest over the sources"),
        (PROVENANCE, lambda c: resolved(c).clear(), "digest over the sources"),
        (PROVENANCE, lambda c: resolved(c).pop(), "with which Python"),
        (PROVENANCE, lambda c: c["predicate"]["runDetails"]["builder"].update(id=""), "who built it"),
        (
            PROVENANCE,
            lambda c: c["predicate"]["buildDefinition"]["externalParameters"].update(module="x"),
            "another module",
        ),
        (PROVENANCE, lambda c: c.pop("predicate"), "predicate"),
    ],
)
def test_a_document_that_is_not_about_this_package_is_refused_by_name(
    tmp_path: Path, name: str, change: Callable[[dict[str, Any]], object], named: str
) -> None:
    path, info = written(tmp_path, spoilt(name, change))
    with pytest.raises(Refused, match=named) as caught:
        package.check_described(path, info)
    assert caught.value.code == (Code.PACKAGE_SBOM if name == SBOM else Code.PACKAGE_PROVENANCE)
    assert "loopback module build" in caught.value.next_step


def test_a_package_of_before_can_be_read_but_says_nothing_of_itself(tmp_path: Path) -> None:
    path, info = written(tmp_path, package.build(FILES, MADE))
    with pytest.raises(Refused, match=r"no sbom\.cdx\.json") as caught:
        package.check_described(path, info)
    assert caught.value.code == Code.PACKAGE_SBOM
    assert package.extract(path, tmp_path / "out") == info


@pytest.mark.parametrize("data", [b"", b"\xff", b"[" * 100_000, b'{"components": ' + b"[" * 100_000, b"null"])
def test_what_is_no_document_is_refused_and_not_a_defect(tmp_path: Path, data: bytes) -> None:
    for name in (SBOM, PROVENANCE):
        content = {**FILES, SBOM: b"{}", name: data}
        path, info = written(tmp_path, package.build(content, MADE))
        with pytest.raises(Refused):
            package.check_described(path, info)


def test_the_documents_are_made_by_the_build_and_by_nobody_else(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="made by the build"):
        described({**FILES, SBOM: b"{}"}, MADE)


def test_a_file_of_a_verified_package_that_changed_since_is_not_believed(tmp_path: Path) -> None:
    path, info = written(tmp_path, described(FILES, MADE))
    path.write_bytes(path.read_bytes().replace(b"#!/bin/sh", b"#!/bin/ev"))
    with pytest.raises(Refused) as caught:
        package.read(path, info, "bin/run", most=100)
    assert caught.value.code == Code.PACKAGE_DIGEST
    with pytest.raises(Refused):
        package.read(path, info, "bin/run", most=3)
    with pytest.raises(Refused):
        package.read(path, info, "absent", most=3)
