"""What a host asks of new credentials and of a move, and what it makes of state that another machine made."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import timedelta
from typing import Any

import pytest
from support_decide import NOW, Host

from loopback.contracts import envelope
from loopback.contracts.codes import Code, Refusal, Refused
from loopback.contracts.keys import SigningKey
from loopback.contracts.messages import HostMove
from loopback.contracts.trustdoc import Operator, Role, Trust
from loopback.host import identity
from loopback.host.state import HostState, ModuleState, Quarantined
from loopback.trust import natsjwt

ROLE, OTHER = SigningKey.generate(), SigningKey.generate()


def jwt(
    key: SigningKey, host: str = "h1", workspace: str = "prod", hours: float = 1.0, **tags: tuple[str, ...]
) -> str:
    wanted = tags.get("tags", (f"ws:{workspace}",))
    return natsjwt.user(ROLE, "ACC", key.public, host, wanted, NOW, NOW + timedelta(hours=hours))


@pytest.mark.parametrize(
    "wrong",
    [
        {"key": OTHER},
        {"host": "h2"},
        {"workspace": "lab"},
        {"hours": -1.0},
        {"tags": ("ws:prod", "ws:lab")},
        {"tags": ()},
    ],
)
def test_credentials_for_anybody_or_anywhere_else_are_refused(wrong: dict[str, Any]) -> None:
    host = Host()
    identity.check_jwt(jwt(host.key), "h1", "prod", host.key.public, NOW)
    with pytest.raises(Refused) as refused:
        identity.check_jwt(jwt(**{"key": host.key} | wrong), "h1", "prod", host.key.public, NOW)
    assert refused.value.code is Code.IDENTITY_CLAIM


def move(host: Host, /, *signers: SigningKey, **changes: Any) -> envelope.Envelope:
    fields = {"host": "h1", "public_key": host.key.public.text, "to": "lab"}
    return host.signers.command(HostMove(**host.signers.times() | fields | changes), *signers)


def checked(
    host: Host, signed: envelope.Envelope, record_at: Any = None, trust: Trust | None = None
) -> Code | None:
    try:
        identity.check_move(signed, "h1", "prod", host.key.public, record_at, trust or host.signers.trust)
    except Refused as refused:
        return refused.code
    return None


def test_a_move_is_believed_only_of_admins_of_both_workspaces() -> None:
    host = Host()
    assert checked(host, move(host)) is None
    assert checked(host, move(host, OTHER)) is Code.SIGNATURE_UNKNOWN_KEY
    for only in ("prod", "lab"):
        operator = Operator("ada", host.signers.operator.public.text, {only: (Role.ADMIN,)})
        document = host.signers.document
        trust = Trust(type(document)(version=2, operators=(operator,), services=document.services))
        assert checked(host, move(host), trust=trust) is Code.COMMAND_UNAUTHORISED


def test_a_move_of_another_host_key_or_place_or_of_before_is_refused() -> None:
    host = Host()
    for wrong in (
        {"host": "h2"}, {"public_key": OTHER.public.text}, {"workspace": "other"}, {"to": "prod"},
    ):  # fmt: skip
        assert checked(host, move(host, **wrong)) is Code.SCOPE_VIOLATION
    assert checked(host, move(host), record_at=NOW) is Code.SCOPE_VIOLATION
    assert checked(host, move(host), record_at=NOW - timedelta(seconds=1)) is None
    assert checked(host, host.record) is Code.SCOPE_VIOLATION


def test_in_another_workspace_a_host_begins_anew_with_what_it_runs_and_what_failed() -> None:
    host = Host()
    state = HostState(
        incarnation="i1",
        generation=7,
        document="d",
        record_at=NOW,
        reports=99,
        workspace="prod",
        machine="s.d",
    )
    assert identity.elsewhere(state, "prod", "i2", NOW) == state
    after = identity.elsewhere(state, "lab", "i2", NOW)
    assert (after.incarnation, after.generation, after.document, after.since) == ("i2", 0, "", NOW)
    assert (after.record_at, after.reports, after.machine, after.workspace) == (NOW, 99, "s.d", "lab")
    failed = (Quarantined(package="f" * 64, refusal=Refusal(Code.MODULE_DIED, "it died")),)
    own = ModuleState(module="tiny", generation=5, promoted=host.own.promoted, previous=host.own.promoted,
                      serial_floor=9, rollout="r", quarantine=failed)  # fmt: skip
    module = identity.resettled(own)
    assert (module.generation, module.promoted, module.previous, module.rollout) == (
        0,
        own.promoted,
        None,
        "",
    )
    assert (module.serial_floor, module.quarantine) == (0, failed)


def test_state_is_bound_to_its_machine_and_a_copy_goes_on_as_another_incarnation() -> None:
    fresh = HostState(incarnation="i1", generation=7, reports=50)
    bound, said = identity.bound(fresh, "machine-a", "salt", "i2", NOW)
    assert (bound.incarnation, said) == ("i1", None), "state of before agents kept this is bound as it is"
    assert "machine-a" not in bound.machine
    assert identity.bound(bound, "machine-a", "other", "i2", NOW) == (bound, None)
    copy, said = identity.bound(bound, "machine-b", "other", "i2", NOW)
    assert (copy.incarnation, copy.since, copy.reports, copy.generation) == ("i2", NOW, 0, 7)
    assert said is not None
    assert said.code is Code.HOST_CLONED
    assert identity.bound(copy, "machine-b", "x", "i3", NOW) == (copy, None)


def test_a_machine_without_an_id_is_named_by_its_boot(tmp_path: Any) -> None:
    (tmp_path / "id").write_text("abc\n")
    assert identity.machine_id(tmp_path / "id") == "abc"
    assert identity.machine_id(tmp_path / "none") == identity.boot_id()


async def test_a_keeper_that_is_cancelled_while_the_client_library_forgets_it_ends_all_the_same() -> None:
    """nats-py waits with asyncio.wait_for, which in Python 3.11 may return instead of being cancelled."""
    keeper = identity.Keeper.__new__(identity.Keeper)
    keeper._answers = asyncio.Queue()
    busy = asyncio.Event()

    async def ask() -> float:
        return 60.0

    async def take(_: bytes) -> None:
        busy.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)

    keeper._ask, keeper._take = ask, take  # type: ignore[method-assign]
    task = asyncio.create_task(keeper.run())
    keeper.told(b"x")
    await busy.wait()
    task.cancel()
    done, _ = await asyncio.wait({task}, timeout=60)
    assert done == {task}
    assert task.cancelled()
