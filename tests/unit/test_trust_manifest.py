"""module.toml: what reads, and that every mistake names its line or field."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support_trust import manifest

from loopback.contracts.codes import Code, Refused
from loopback.trust import manifest as manifests
from loopback.trust.manifest import Manifest, RequiresTable

GOOD = """
[module]
name = "firewall"
version = "1.0.0"
summary = "An eBPF firewall"
abi = [1, 1]
entry = ["{python}", "-P", "-m", "loopback.modules.firewall"]
capabilities = ["CAP_BPF", "CAP_NET_ADMIN"]
[requires]
kernel = "5.17"
features = ["btf", "xdp"]
architectures = ["x86_64", "aarch64"]
agent = ">=0.1"
python = ">=3.11"
libraries = {msgspec = ">=0.19"}
[limits]
memory_mib = 128
[health]
interval_s = 2
[build]
python = ["loopback/contracts"]
bpf = ["bpf/programs/firewall.bpf.c"]
"""


def test_a_whole_manifest_reads_and_says_what_a_host_needs() -> None:
    found = manifests.parse(GOOD.encode())
    assert (found.name, found.version, found.limits.memory_mib) == ("firewall", "1.0.0", 128)
    needs = found.requirements()
    assert (needs.kernel, needs.features, needs.capabilities) == (
        "5.17",
        ("btf", "xdp"),
        ("CAP_BPF", "CAP_NET_ADMIN"),
    )


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        (('version = "1.0.0"', ""), Code.MANIFEST_INVALID, "module: .*version"),
        (('version = "1.0.0"', 'version = "one"'), Code.MANIFEST_INVALID, "module.version"),
        (('version = "1.0.0"', 'version = "v1.0"'), Code.MANIFEST_INVALID, "module.version.*'1.0'"),
        (('version = "1.0.0"', 'version = "1!1.0"'), Code.MANIFEST_INVALID, "module.version"),
        (('name = "firewall"', 'name = "../x"'), Code.MANIFEST_INVALID, "module.name"),
        (('name = "firewall"', "name = 3"), Code.MANIFEST_INVALID, "module.name.*str"),
        (("abi = [1, 1]", "abi = [2, 1]"), Code.MANIFEST_ABI, "module.abi"),
        (("abi = [1, 1]", "abi = [1]"), Code.MANIFEST_INVALID, "module.abi"),
        (('"CAP_BPF"', '"CAP_EVERYTHING"'), Code.MANIFEST_CAPABILITY, "CAP_EVERYTHING"),
        (('kernel = "5.17"', 'kernel = "new"'), Code.MANIFEST_INVALID, "requires.kernel"),
        (('agent = ">=0.1"', 'agent = "newest"'), Code.MANIFEST_INVALID, "requires.agent"),
        (('">=0.19"', '"many"'), Code.MANIFEST_INVALID, "requires.libraries.msgspec"),
        (('"btf"', '"b t f"'), Code.MANIFEST_INVALID, "requires.features"),
        (("memory_mib = 128", "memory_mib = 0"), Code.MANIFEST_INVALID, "limits.memory_mib"),
        (("memory_mib = 128", "memory = 0"), Code.MANIFEST_INVALID, "limits.*memory"),
        (("interval_s = 2", "interval_s = nan"), Code.MANIFEST_INVALID, "health.interval_s"),
        (("[limits]", "[limts]"), Code.MANIFEST_INVALID, "limts"),
        (("[limits]", "[limits"), Code.MANIFEST_INVALID, "line 16"),
        (('entry = ["{python}", "-P", "-m", "loopback.modules.firewall"]', "entry = []"), Code.MANIFEST_INVALID, "entry"),
    ],
)  # fmt: skip
def test_a_mistake_is_refused_with_file_and_field(change: tuple[str, str], code: Code, named: str) -> None:
    assert change[0] in GOOD
    with pytest.raises(Refused, match=named) as caught:
        manifests.parse(GOOD.replace(*change, 1).encode(), "there/module.toml")
    assert caught.value.code == code
    assert "there/module.toml" in caught.value.reason


@pytest.mark.parametrize("data", [b"", b"\xff", b"x" * 100_000, b"module = 1", b"a = " + b"[" * 5000])
def test_what_is_no_manifest_at_all_is_refused(data: bytes) -> None:
    with pytest.raises(Refused) as caught:
        manifests.parse(data)
    assert caught.value.code == Code.MANIFEST_INVALID


def test_an_abi_that_the_agent_does_not_speak_is_refused() -> None:
    manifest(abi=(1, 3)).require_abi(1, 1)
    for theirs in ((2, 3), (7, 7)):
        with pytest.raises(Refused, match=r"module\.abi") as caught:
            manifest(abi=theirs).require_abi(1, 1)
        assert caught.value.code == Code.MANIFEST_ABI


def test_another_version_is_checked_like_the_files_own() -> None:
    assert manifest().with_version("1.1.0").version == "1.1.0"
    with pytest.raises(Refused, match=r"module\.version"):
        manifest().with_version("latest")


texts = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1, max_size=20)


@given(st.lists(texts, min_size=1, max_size=4), texts, st.dictionaries(texts, st.just(">=1"), max_size=3))
def test_the_packaged_form_reads_back_as_the_same_manifest_without_the_build_table(
    entry: list[str], summary: str, libraries: dict[str, str]
) -> None:
    first = manifest(entry=tuple(entry), summary=summary)
    first = Manifest(module=first.module, requires=RequiresTable(libraries=libraries))
    data = first.to_toml()
    assert manifests.parse(data) == first
    assert "build" not in tomllib.loads(data.decode())
