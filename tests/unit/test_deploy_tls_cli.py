"""`loopback tls` as a person types it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from loopback.cli import certificates, main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def loopback(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main.main(["tls", *words])
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return run


def test_it_makes_an_authority_and_a_certificate_for_each_server(tmp_path: Path, loopback: Run) -> None:
    out = str(tmp_path / "tls")
    code, told, said = loopback(
        "init", "--out", out, "--host", "nats-1,nats-1.example,10.0.0.11", "--host", "nats-2"
    )
    assert (code, told.split()) == (0, [f"{out}/nats-1.pem", f"{out}/nats-2.pem"])
    assert "keep it offline" in said and "loopback tls renew" in said
    found = certificates.servers(tmp_path / "tls")
    assert set(certificates.names_of(found["nats-1"])) == {"nats-1", "nats-1.example", "10.0.0.11"}
    authority = (tmp_path / "tls" / "ca.pem").read_bytes()
    assert loopback("init", "--out", out, "--host", "nats-3")[0] == 0
    assert (tmp_path / "tls" / "ca.pem").read_bytes() == authority, "one more server, the same authority"


def test_it_renews_what_ends_soon_and_nothing_else(tmp_path: Path, loopback: Run) -> None:
    certificates.make_authority(tmp_path)
    certificates.issue(tmp_path, "old", ["old", "192.0.2.1"], datetime.now(UTC) - timedelta(days=70))
    certificates.issue(tmp_path, "new", ["new"])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    code, told, said = loopback("renew", "--out", str(tmp_path))
    assert (code, told.strip()) == (0, str(tmp_path / "old.pem"))
    assert "new is good until" in said
    changed = {name for name, data in before.items() if (tmp_path / name).read_bytes() != data}
    assert changed == {"old.pem", "old.key"}
    renewed = certificates.servers(tmp_path)["old"]
    assert set(certificates.names_of(renewed)) == {"old", "192.0.2.1"}
    assert not certificates.due(renewed, datetime.now(UTC))


def test_mistakes_are_told_in_words(tmp_path: Path, loopback: Run) -> None:
    for words in (
        ("init", "--out", str(tmp_path), "--host", "not a name"),
        ("init", "--out", str(tmp_path), "--host", ","),
        ("init", "--out", str(tmp_path), "--host", "ok,no_name!"),
    ):
        code, told, said = loopback(*words)
        assert code == 2 and "[name.invalid]" in said and "Traceback" not in said and not told, said
