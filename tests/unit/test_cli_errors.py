"""What a person can get wrong about an installation ends in one clear message, never in a traceback."""

from __future__ import annotations

import errno
import logging
from pathlib import Path

import pytest

from loopback.cli import context, home, main
from loopback.contracts.codes import Code


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        main.main(list(words))
    return int(end.value.code or 0), capsys.readouterr().err


def test_a_context_file_that_is_no_text_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "context.toml").write_bytes(b"\xff\xfe")
    code, said = run(capsys, "--home", str(tmp_path), "hosts")
    assert (code, str(tmp_path / "context.toml") in said) == (2, True)


def test_credentials_that_are_none_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    context.save(tmp_path, url="nats://127.0.0.1:1", creds="my.creds", operator_key="my.pem")
    (tmp_path / "my.creds").write_text("garbage")
    code, said = run(capsys, "--home", str(tmp_path), "hosts")
    assert (code, "my.creds" in said, Code.SIGNATURE_INVALID in said) == (2, True, True)


@pytest.mark.parametrize("number", [errno.EEXIST, errno.ENOSPC, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP])
def test_what_a_file_system_refuses_is_explained(number: int) -> None:
    error = OSError(number, "refused", "/some/where")
    words = main.explain(error)
    assert words is not None
    assert "/some/where" in words


def test_another_operators_key_is_named_for_one_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context.save(tmp_path, url="nats://127.0.0.1:1", creds="c", operator_key="keys/ann.pem")
    home.begin(tmp_path, None)
    assert context.load().operator_key == tmp_path / "keys" / "ann.pem"
    home.begin(tmp_path, None, tmp_path / "bob.pem")
    assert context.load().operator_key == tmp_path / "bob.pem"
    monkeypatch.setenv(home.OPERATOR_VARIABLE, str(tmp_path / "eve.pem"))
    home.begin(tmp_path, None)
    assert context.load().operator_key == tmp_path / "eve.pem"
    monkeypatch.delenv(home.OPERATOR_VARIABLE)
    home.begin(None, None)


def test_what_asyncio_says_whenever_tls_ends_is_not_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    run(capsys, "--home", str(tmp_path), "hosts")
    logging.getLogger("asyncio").warning("returning true from eof_received() has no effect when using ssl")
    logging.getLogger("asyncio").warning("another word")
    assert caplog.messages == ["another word"]
