"""The runtime's pure parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopback.cli import creds
from loopback.contracts import subjects
from loopback.contracts.codes import Refused
from loopback.services._runtime import streams, wire
from loopback.services._runtime.broker import Broker
from loopback.services._runtime.settings import Settings, read_identity
from loopback.services._runtime.tracing import template_of

HEADER_NAMES = st.from_regex(r"[A-Za-z][A-Za-z0-9-]{0,20}", fullmatch=True)
HEADER_VALUES = st.from_regex(r"[!-~]([ -~]{0,30}[!-~])?", fullmatch=True)


@given(st.dictionaries(HEADER_NAMES, HEADER_VALUES, max_size=5))
def test_headers_read_back_as_the_server_stores_them(headers: dict[str, str]) -> None:
    raw = "NATS/1.0\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "\r\n"
    assert wire.read_headers(raw.encode()) == headers


@given(st.binary(max_size=200))
def test_headers_that_a_publisher_made_of_any_bytes_are_read(raw: bytes) -> None:
    wire.read_headers(b"NATS/1.0\r\n" + raw)
    assert wire.read_headers(b"NATS/1.0\r\nX: \xff\r\nY: 1\r\n\r\n")["Y"] == "1"


def test_no_headers_read_as_none() -> None:
    assert wire.read_headers(b"") == {}


def test_an_acknowledgement_is_a_sequence() -> None:
    ack = wire.read_ack(b'{"stream":"S","seq":7,"duplicate":true,"domain":"new field"}')
    assert (ack.stream, ack.seq, ack.duplicate) == ("S", 7, True)


@pytest.mark.parametrize("code", [wire.WRONG_LAST_SEQUENCE, wire.SUBJECT_FULL, wire.DUPLICATE_IN_BATCH])
def test_a_lost_race_is_a_conflict_that_names_the_stream(code: int) -> None:
    answer = {"error": {"code": 400, "err_code": code, "description": "no"}, "stream": "S", "seq": 0}
    with pytest.raises(wire.Conflict) as conflict:
        wire.read_ack(json.dumps(answer).encode())
    assert conflict.value.args[1] == "S"


def test_another_error_keeps_its_code_and_words() -> None:
    answer = (
        b'{"error":{"code":400,"err_code":10174,"description":"atomic publish is disabled"},"stream":"F"}'
    )
    with pytest.raises(wire.ApiError, match="atomic publish is disabled") as error:
        wire.read_ack(answer)
    assert (error.value.status, error.value.code) == (400, 10174)


@pytest.mark.parametrize(
    ("subject", "template"),
    [
        (
            subjects.command("p", "activation", "rollout-start"),
            "lb.ws.{workspace}.cmd.activation.rollout-start",
        ),
        (subjects.rollout("p", "web.1", "created"), "lb.ws.{workspace}.rollout.{rollout}.created"),
        (subjects.desired("p", "h"), "lb.ws.{workspace}.desired.{id}"),
        (subjects.to_host("p", "h", "desired"), "lb.ws.{workspace}.to.{host}.desired"),
        (subjects.from_host("p", "h", "status"), "lb.ws.{workspace}.from.{host}.status"),
        (subjects.verdict("p", "r", "delivery"), "lb.ws.{workspace}.verdict.{rollout}.delivery"),
        (subjects.record("p", "host", "h"), "lb.ws.{workspace}.record.host.{name}"),
        (subjects.result("p", "c"), "lb.ws.{workspace}.result.{id}"),
        (subjects.journal("p", "activation", "refused"), "lb.ws.{workspace}.journal.activation.refused"),
        (subjects.catalog("firewall", "00"), "lb.catalog.{id}.{id}"),
        ("$SRV.PING", "$SRV.PING"),
    ],
)
def test_a_subjects_template_names_no_host_and_no_id(subject: str, template: str) -> None:
    assert template_of(subject) == template


def test_every_subject_is_kept_by_exactly_one_stream() -> None:
    """Overlapping streams would be refused by the server; a subject that none keeps would be lost."""
    kept = [*streams.configurations(), streams.workspace_configuration("p")]
    w, h = "p", "h"
    for subject, stream in {
        subjects.command(w, "activation", "x"): "LB_CMD",
        subjects.result(w, "c"): "LB_WS_p",
        subjects.journal(w, "activation", "refused"): "LB_WS_p",
        subjects.rollout(w, "r", "created"): "LB_WS_p",
        subjects.desired(w, h): "LB_WS_p",
        subjects.record(w, "host", h): "LB_FLEET",
        subjects.offer(w, h): "LB_FLEET",
        subjects.verdict(w, "r", "delivery"): "LB_FLEET",
        subjects.presence(w, h): "LB_FLEET",
        subjects.from_host(w, h, "status"): "LB_FROM",
        subjects.from_host(w, h, "inventory"): "LB_FROM",
        subjects.from_host(w, h, "heartbeat"): "LB_FROM",
        subjects.from_host(w, h, "otlp"): "LB_OTLP",
        subjects.catalog("m", "00"): "LB_CATALOG",
        subjects.blob("00", 0): "LB_BLOB",
        subjects.tuf("1.root.json"): "LB_TUF",
        "$KV.LB_VIEW.p.h": "KV_LB_VIEW",
    }.items():
        assert [c["name"] for c in kept if any(_matches(f, subject) for f in c["subjects"])] == [stream]
    to_host = subjects.to_host(w, h, "desired")
    assert not any(_matches(f, to_host) for c in kept for f in c["subjects"]), (
        "hosts' copies are not kept twice"
    )


def _matches(pattern: str, subject: str) -> bool:
    wanted, found = pattern.split("."), subject.split(".")
    for number, part in enumerate(wanted):
        if part == ">":
            return len(found) > number
        if number >= len(found) or part not in ("*", found[number]):
            return False
    return len(wanted) == len(found)


def test_replicas_of_one_home_do_not_share_a_state_folder(tmp_path: Path) -> None:
    one, two = (Settings(url="", creds=tmp_path, home=tmp_path, instance=i) for i in "12")
    assert one.state("activation") != two.state("activation")
    assert one.pinned_root == tmp_path / "tuf" / "root.json"


def test_an_identity_is_read_from_its_credentials(tmp_path: Path) -> None:
    creds.init_home(tmp_path)
    (tmp_path / "h.creds").write_text(creds.host_creds(tmp_path, "prod", "db.example.org"))
    identity = read_identity(tmp_path / "h.creds")
    assert identity.name == "db_2eexample_2eorg"
    assert identity.seed.startswith("SU")
    assert read_identity(tmp_path / "creds" / "activation.creds").name == "activation"


def test_every_host_gets_a_key_of_its_own(tmp_path: Path) -> None:
    creds.init_home(tmp_path)
    assert creds.host_creds(tmp_path, "prod", "a") != creds.host_creds(tmp_path, "prod", "a")


@pytest.mark.parametrize("identity", list(creds.permissions()))
def test_only_the_admin_has_power_over_streams(identity: str) -> None:
    if identity == creds.ADMIN:
        return
    allowed = creds.permissions()[identity].publish
    makes = [s for s in allowed if s.startswith("$JS.API.STREAM.") and s.split(".")[3] not in ("INFO", "MSG")]
    readers = {"$JS.API.STREAM.NAMES", "$JS.API.STREAM.LIST"}
    # a workspace's stream for eligibility; content that nobody names any more, for delivery
    given = {"eligibility": {"$JS.API.STREAM.CREATE.*"}, "delivery": {"$JS.API.STREAM.PURGE.LB_BLOB"}}
    assert set(makes) - readers == given.get(identity, set())
    assert not [s for s in allowed if s in (">", "$JS.>", "$JS.API.>", "lb.>") or s.startswith("_INBOX.>")]


@pytest.mark.parametrize("listen", ["nonsense", "127.0.0.1", "127.0.0.1:x", ":4222", ""])
def test_an_address_that_is_none_is_refused(tmp_path: Path, listen: str) -> None:
    with pytest.raises(Refused, match="host:port"):
        Broker(tmp_path, listen=listen)
