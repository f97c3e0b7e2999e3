"""Whoever has the broker writes what they like into the streams: an audit reports it, and never falls over it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
from golden_contracts import FOLDER
from hypothesis import given, settings
from hypothesis import strategies as st
from test_audit_words import KEPT, NOW, TRUSTS

from loopback.cli import audit, posturedoc, posturemd, posturing, witnessing
from loopback.cli.auditing import Auditor
from loopback.cli.evidence import Evidence, Stored, Stream, Trusted
from loopback.cli.posturing import Contents

_GOLDENS = [path.read_bytes() for path in sorted(FOLDER.glob("*.json"))]
_WHERE = [
    "lb.ws.prod.cmd.eligibility.host-put", "lb.ws.prod.cmd.x", "lb.ws.prod.journal.activation.refused", "lb.ws.prod.result.X",
    "lb.ws.prod.rollout.r1.created", "lb.ws.prod.rollout.R.", "lb.ws.prod.record.host.web-1", "lb.ws.prod.record.host.W",
    "lb.ws.prod.from.web-1.status", "lb.ws.prod.from.W.status", "$KV.LB_VIEW.prod.web-1", "lb.catalog.firewall.aa",
]  # fmt: skip
_WORDS = [
    b"2026-11-23T20:30:00",
    b"0001-01-01T00:00:00Z",
    b"9999-12-31T23:59:59Z",
    b"-1",
    b"1e999",
    b"null",
    b"\xff",
    b"[]",
    b'""',
]


@st.composite
def bytes_of_anybody(draw: st.DrawFn) -> bytes:
    """Anything, or a good message with a part of it replaced."""
    if draw(st.integers(0, 3)) == 0:
        return draw(st.binary(max_size=200))
    data = draw(st.sampled_from(_GOLDENS))
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 40)))
        data = data[:start] + draw(st.sampled_from(_WORDS)) + data[end:]
    return data.replace(
        b"2026-11-23T20:30:00.25Z",
        draw(st.sampled_from([b"2026-11-23T20:30:00", b"2026-11-23T20:30:00.25Z"])),
    )


def stored() -> st.SearchStrategy[Stored]:
    times = st.sampled_from(
        [NOW, NOW - timedelta(days=400), datetime.min.replace(tzinfo=UTC) + timedelta(days=1)]
    )
    return st.builds(Stored, st.sampled_from(_WHERE), bytes_of_anybody(), st.integers(1, 2**40), times)


@settings(max_examples=300, deadline=None)
@given(st.lists(stored(), max_size=8), st.data())
def test_no_bytes_in_any_stream_make_an_audit_fall_over(messages: list[Stored], data: st.DataObject) -> None:
    parts: dict[str, list[Stored]] = {}
    fields = ("reports", "views", "records", "commands", "journal", "links", "catalog")
    for message in messages:
        parts.setdefault(data.draw(st.sampled_from(fields)), []).append(message)
    found = Evidence(
        workspace="prod", at=NOW, streams=(Stream("LB_WS_prod", NOW, 1, 9, 0),),
        **{name: tuple(part) for name, part in parts.items()},
    )  # fmt: skip
    hosts: dict[str, Any] = audit.host_records(found, TRUSTS)
    journal, state, links = witnessing.examine(found, lambda *_: None, ["web-1", *hosts])
    said = Auditor(found, TRUSTS, KEPT).run(links)
    assert len(witnessing.summary(journal)) >= 1
    examined = audit.Examined(found, Trusted(TRUSTS[0], (), {}, ()), journal, state, said, hosts)
    posture = posturing.build(examined, Contents({}, {}), NOW)
    assert posturedoc.decode(msgspec.json.encode(posture)) == posture
    assert posturemd.render(posture).startswith("# Security posture of workspace prod")
