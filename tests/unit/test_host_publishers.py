"""Whose releases may run: the owner's list and the workspace's pins only ever take away from what TUF entitles."""

from __future__ import annotations

import itertools

import pytest

from loopback.contracts.codes import Code, Refused
from loopback.host.publishers import check_publishers

ADA, BOB, EVE = "a" * 64, "b" * 64, "e" * 64


def test_without_any_list_whoever_tuf_entitles_may_publish() -> None:
    check_publishers((EVE,), (), None, False)


@pytest.mark.parametrize(
    ("signers", "local", "pinned", "regulated", "named"),
    [
        ((EVE,), (ADA,), None, False, f"signed by {EVE}.*owner does not allow.*host.toml"),
        ((), (ADA,), None, False, "nobody known.*host.toml"),
        ((EVE,), (), (ADA, BOB), False, f"signed by {EVE}.*pins {ADA[:16]}, {BOB[:16]}.*trust document"),
        ((EVE,), (), (), False, "pins nobody"),
        ((ADA,), (), None, True, "regulated.*pins no publisher"),
        ((ADA,), (ADA,), None, True, "regulated"),
        ((BOB,), (ADA,), (BOB,), True, "owner does not allow"),
        ((ADA, BOB), (ADA,), (BOB,), False, "both"),
    ],
)
def test_a_publisher_who_is_on_no_list_is_refused_and_named(
    signers: tuple[str, ...],
    local: tuple[str, ...],
    pinned: tuple[str, ...] | None,
    regulated: bool,
    named: str,
) -> None:
    with pytest.raises(Refused, match=named) as caught:
        check_publishers(signers, local, pinned, regulated, what="tiny 1.0")
    assert caught.value.code == (
        Code.HOST_NOT_ALLOWED if "owner does" in named or "host.toml" in named else Code.HOST_PUBLISHER
    )
    assert "tiny 1.0" in caught.value.reason
    assert caught.value.next_step


def test_exactly_those_pass_who_have_one_key_on_every_list_there_is() -> None:
    """All combinations, against the rule said as a set."""
    some = [tuple(c) for n in range(3) for c in itertools.combinations((ADA, BOB, EVE), n)]
    for signers, local, pinned, regulated in itertools.product(some, some, [None, *some], (False, True)):
        left = (
            set(signers)
            & (set(local) or {ADA, BOB, EVE})
            & ({ADA, BOB, EVE} if pinned is None else set(pinned))
        )
        listed = bool(local) or pinned is not None
        wanted = bool(left) if listed else True
        if regulated and pinned is None:
            wanted = False
        try:
            check_publishers(signers, local, pinned, regulated)
            passed = True
        except Refused:
            passed = False
        assert passed is wanted, (signers, local, pinned, regulated)
