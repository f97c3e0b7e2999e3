"""A host that decides, and everybody who signs for it, for the stories of what a host obeys."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from support_host import WORKSPACE, Signers

from loopback.contracts.codes import Code, Refused
from loopback.contracts.desired import DesiredModule, DesiredState, Running
from loopback.contracts.envelope import Envelope
from loopback.contracts.keys import SigningKey
from loopback.contracts.reports import Phase
from loopback.host.decide import Accepted, check_desired
from loopback.host.scope import Answer, Identity
from loopback.host.state import HostState, ModuleState

OLD = Running(version="1.0", package="a" * 64, policy="b" * 64, policy_serial=1)
NEW = Running(version="1.1", package="c" * 64, policy="d" * 64, policy_serial=2)
NOW = datetime.now(UTC)


class Host:
    """A host that promoted OLD during rollout r0, and everybody who signs for it."""

    def __init__(self) -> None:
        # Signed and judged by one clock: a run that takes minutes changes nothing.
        self.signers = Signers(clock=lambda: NOW)
        self.key = SigningKey.generate()
        self.record = self.signers.record("h1", self.key.public.text, role="web")
        self.state = HostState(incarnation="i1", generation=4)
        self.own = ModuleState(
            module="tiny", generation=4, rollout="r0", phase=Phase.PROMOTED, target=OLD, promoted=OLD,
            previous=None, previous_rollout="r0", serial_floor=1, floor_policy=OLD.policy,
        )  # fmt: skip
        self.modules: tuple[str, ...] = ("tiny",)

    def check(self, signed: Envelope, now: datetime = NOW) -> Accepted:
        identity = Identity(host="h1", workspace=WORKSPACE, key=self.key.public, modules=self.modules)
        return check_desired(signed, identity, self.state, {"tiny": self.own}, self.signers.trust, now)

    def document(self, *entries: DesiredModule, **changes: Any) -> DesiredState:
        return self.signers.desired("h1", self.record, *entries, **changes)

    def entry(self, target: Running | None = NEW, generation: int = 5, **changes: Any) -> DesiredModule:
        return self.signers.entry(target, generation, **({"expected": OLD} | changes))

    def ask(self, entry: DesiredModule | None = None, now: datetime = NOW, **changes: Any) -> Answer | Code:
        """The answer to one entry, or the code with which it is refused."""
        document = self.document(entry or self.entry(), **changes)
        (checked,) = self.check(self.signers.sealed(document), now).entries
        if checked.answer is Answer.REFUSED:
            assert checked.refusal is not None
            assert checked.refusal.reason
            return checked.refusal.code
        return checked.answer

    def refused(self, signed: Envelope) -> Code:
        with pytest.raises(Refused) as caught:
            self.check(signed)
        return caught.value.code
