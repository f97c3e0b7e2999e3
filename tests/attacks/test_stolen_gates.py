"""Gates are activation's own business, so what becomes of them in the wrong hands is a story of its own.

No host compares anything with `gates`, `waves` or `max_unavailable`: whoever has activation's key skips them as it likes, and
`rollout plan` says so. But an honest activation, on a broker that is somebody else's, goes by what is stored. What keeps looser
gates from an operator's fleet is that the very command which has them is shown to every host, and the operator's signature is
not under it any more.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import msgspec
import pytest
from activation_world import ACTIVATION, OPERATOR, World
from support_stolen import forgetful, without_signatures

from loopback.contracts import envelope, journal
from loopback.contracts.codes import Code
from loopback.contracts.desired import DesiredState
from loopback.contracts.envelope import Envelope
from loopback.contracts.keys import SigningKey
from loopback.contracts.messages import Gates, HostPut, RolloutStart, Wave
from loopback.contracts.reports import Phase
from loopback.contracts.trustdoc import Operator, Role, Trust, TrustDocument
from loopback.host.decide import Checked, check_desired
from loopback.host.scope import Answer, Identity
from loopback.host.state import HostState

HOSTS = 8
TRUST = Trust(
    TrustDocument(
        version=1,
        operators=(Operator("ada", OPERATOR.public.text, {"*": tuple(Role)}),),
        services={"activation": (ACTIVATION.public.text,)},
    )
)
#: What the operator signed: one canary, and nobody may fail.
SIGNED: dict[str, Any] = {
    "gates": Gates(max_failed=0.0, min_sample=1),
    "waves": (Wave(name="canary", count=2, soak_s=3600.0), Wave(name="rest", percent=100)),
    "max_unavailable": 0.25,
}


class Looser(NamedTuple):
    """What the thief would rather have of one field, and where it shows: hosts changed within a time, or changed at once."""

    value: Any
    works: Callable[[int], bool]  # on the first host that is asked, the second …
    hours: float
    at_once: bool = False


LOOSER: dict[str, Looser] = {
    "gates": Looser(Gates(max_failed=1.0, min_sample=1), lambda number: number == 0, 3.0),
    "waves": Looser((Wave(name="all", percent=100),), lambda number: True, 0.5),
    "max_unavailable": Looser(1.0, lambda number: True, 3.0, at_once=True),
}


class Store(World):
    """Activation's journal on a broker whose owner changes what is stored; and hosts that check what they are told."""

    def __init__(self, **changes: Any) -> None:
        super().__init__(HOSTS)
        self.keys = {host: SigningKey.generate() for host in self.labels}
        self.changes = changes

    def write(self, rollout: str, *events: journal.AnyEvent) -> None:
        super().write(rollout, *(self._changed(event) for event in events))

    def _changed(self, event: journal.AnyEvent) -> journal.AnyEvent:
        if not isinstance(event, journal.Created) or not self.changes:
            return event
        start: RolloutStart = msgspec.structs.replace(event.start(), **self.changes)
        forged = envelope.seal(envelope.COMMAND, msgspec.json.encode(start), ACTIVATION)
        kept = Envelope(forged.payload, forged.payloadType, event.envelope.signatures)
        return msgspec.structs.replace(event, envelope=kept)

    def check(self, host: str) -> Checked:
        """What the host makes of the document that activation has for it."""
        key = self.keys[host]
        put = HostPut(
            id="p", workspace="prod", issued_at=self.now, expires_at=self.now, host=host, public_key=key.public.text
        )  # fmt: skip
        record = envelope.seal(envelope.COMMAND, msgspec.json.encode(put), OPERATOR)
        document: DesiredState = msgspec.structs.replace(self.desired[host][-1], record=record)
        signed = envelope.seal(envelope.DESIRED, msgspec.json.encode(document), ACTIVATION)
        identity = Identity(host=host, workspace="prod", key=key.public, modules=("firewall",))
        with forgetful():
            return check_desired(signed, identity, HostState(incarnation="i"), {}, TRUST, self.now).entries[0]

    def harm(self, looser: Looser) -> int:
        """Roll it out, and count the hosts that changed within the time, or at the same moment."""
        self.begin(**SIGNED)
        ran: list[str] = []
        most = 0
        until = self.now + timedelta(hours=looser.hours)
        while self.now < until:
            obeyed = [host for host in self.assigned() if self.obeys(host)]
            most = max(most, len(obeyed))
            for host in obeyed:
                if looser.works(len(ran)):
                    self.report(host, Phase.PROMOTED, self.wanted(host))
                else:
                    self.report(host, Phase.ROLLED_BACK, None, code=Code.MODULE_DIED)
                ran.append(host)
            self.decide()
            if not self.assigned():
                self.wait(300)
        return most if looser.at_once else len(ran)

    def obeys(self, host: str) -> bool:
        """Whether the host does what it is told; where not, it says why."""
        checked = self.check(host)
        if checked.answer is Answer.CHANGE:
            return True
        assert checked.refusal is not None
        assert checked.refusal.code == Code.SIGNATURE_INVALID
        self.report(host, Phase.REJECTED, None, code=checked.refusal.code)
        return False


@pytest.mark.parametrize("field", LOOSER)
def test_looser_gates_waves_or_pace_than_an_operator_signed_change_no_host(
    field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signature under the start is the one defence of these fields."""
    looser = LOOSER[field]
    assert Store().harm(looser) == 2, "as it was signed: the canary, and two at a time"
    with monkeypatch.context() as lenient:
        without_signatures(lenient)
        assert Store(**{field: looser.value}).harm(looser) >= HOSTS - 2
    assert Store(**{field: looser.value}).harm(looser) == 0
