"""Names become subject tokens and come back; no two names share one, and no name reaches another place on the bus."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from loopback.contracts import subjects
from loopback.contracts.codes import Code, Refused

NAMES = st.text(min_size=1, max_size=40).filter(
    lambda name: name != "*" and len(name.encode(errors="replace")) < 60
)
TOKENS = st.text(alphabet="abcz019_-.*> \u00e4A", min_size=1, max_size=12)


@given(NAMES)
@example("web-1.example")
@example("UPPER_case")
@example("_5f")
@example("ä.*>")
def test_a_token_leads_back_to_its_name(name: str) -> None:
    assert subjects.untoken(subjects.token(name)) == name


@given(NAMES)
@example("a.b.c")
@example(">")
@example("* *")
def test_a_token_is_one_plain_word_for_nats(name: str) -> None:
    assert re.fullmatch(r"[a-z0-9_-]+", subjects.token(name))


@given(NAMES, NAMES)
@example("a", "A")
@example("a.b", "a_2eb")
@example("_", "__")
def test_two_names_never_share_a_token(one: str, two: str) -> None:
    assume(one != two)
    assert subjects.token(one) != subjects.token(two)


@given(TOKENS)
@example("_41")
@example("_61")
@example("_2E")
@example("_ff")
@example("_c3_28")
def test_what_token_cannot_have_made_is_refused(escaped: str) -> None:
    try:
        name = subjects.untoken(escaped)
    except Refused as error:
        assert error.code is Code.NAME_INVALID
    else:
        assert subjects.token(name) == escaped


@pytest.mark.parametrize("name", ["", "*", "a" * 201, "." * 67, "\ud800", "a\udcff"])
def test_names_without_a_token_are_refused(name: str) -> None:
    with pytest.raises(Refused) as caught:
        subjects.token(name)
    assert caught.value.code is Code.NAME_INVALID


@given(NAMES, NAMES)
def test_a_subject_comes_apart_into_the_names_it_was_made_of(workspace: str, host: str) -> None:
    assert subjects.parse(subjects.from_host(workspace, host, "status")) == _parsed(
        workspace, "from", host, "status"
    )
    assert subjects.parse(subjects.rollout(workspace, host, "created")) == _parsed(
        workspace, "rollout", host, "created"
    )
    assert subjects.parse(subjects.desired(workspace, host)) == _parsed(workspace, "desired", host)
    assert subjects.parse(subjects.command(workspace, "activation", host)) == _parsed(
        workspace, "cmd", "activation", host
    )


def _parsed(workspace: str, area: str, *rest: str) -> subjects.Parsed:
    return subjects.Parsed(workspace, area, rest)


@pytest.mark.parametrize(
    "subject",
    ["", "lb", "lb.ws", "lb.ws.prod.cmd", "lb.catalog.x.y.z", "xx.ws.prod.cmd.activation.x", "$JS.API.DIRECT.GET.LB_CMD"],
)  # fmt: skip
def test_what_is_no_workspace_subject_is_refused(subject: str) -> None:
    with pytest.raises(Refused) as caught:
        subjects.parse(subject)
    assert caught.value.code is Code.COMMAND_WRONG_SUBJECT


@pytest.mark.parametrize(
    "subject", ["lb.ws.PROD.cmd.a.b", "lb.ws.*.cmd.a.b", "lb.ws.prod.from.a_2Eb.status", "lb.ws..cmd.a.b"]
)
def test_a_workspace_subject_with_a_name_nobody_escapes_so_is_refused(subject: str) -> None:
    with pytest.raises(Refused) as caught:
        subjects.parse(subject)
    assert caught.value.code is Code.NAME_INVALID
