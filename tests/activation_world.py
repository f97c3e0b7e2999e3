"""A world without a broker for activation's rules: one journal, a clock that tests set, hosts that say what tests tell them."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from loopback.contracts import envelope, journal, rolloutplan
from loopback.contracts.codes import Code, Refusal
from loopback.contracts.desired import DesiredState, Running
from loopback.contracts.envelope import Envelope
from loopback.contracts.keys import SigningKey
from loopback.contracts.messages import Presence, RolloutApprove, RolloutStart, Scope, Selector, Verdict, Wave
from loopback.contracts.reports import ModuleStatus, Phase, Status
from loopback.contracts.rolloutfold import fold
from loopback.contracts.rolloutstate import Rollout, Standing, State, Workspace
from loopback.services.activation import decide as rules
from loopback.services.activation import documents, facts

T0 = datetime(2026, 11, 1, 12, 0, tzinfo=UTC)
OPERATOR = SigningKey.from_raw(bytes(range(32)))
APPROVER = SigningKey.from_raw(bytes(range(2, 34)))
ACTIVATION = SigningKey.from_raw(bytes(range(1, 33)))
PACKAGES = {"1.0.0": "a" * 64, "1.1.0": "b" * 64, "1.2.0": "c" * 64}


def start_command(rollout: str, at: datetime, **changes: Any) -> RolloutStart:
    """A rollout of firewall 1.0.0: one canary, then everybody. `changes` replace fields of command or scope."""
    version = changes.pop("version", "1.0.0")
    scope = Scope(
        workspace=changes.get("workspace", "prod"),
        module=changes.get("module", "firewall"),
        packages=changes.pop("packages", {version: PACKAGES[version]} if version else {}),
        policy=changes.pop("policy", "d" * 64),
        policy_serial=changes.pop("policy_serial", 1),
        selector=changes.pop("selector", Selector()),
        not_before=changes.pop("not_before", at - timedelta(minutes=1)),
        not_after=changes.pop("not_after", at + timedelta(days=1)),
        on_failure=changes.pop("on_failure", "rollback"),
        absent=changes.pop("absent", False),
    )
    fields: dict[str, Any] = {
        "id": f"command-{rollout}",
        "workspace": "prod",
        "issued_at": at,
        "expires_at": at + timedelta(hours=1),
        "rollout": rollout,
        "module": "firewall",
        "version": version,
        "waves": (Wave(name="canary", count=1), Wave(name="rest", percent=100)),
        "scope": scope,
    }
    return RolloutStart(**(fields | changes))


def approval_command(rollout: Rollout, at: datetime, key: SigningKey = APPROVER, **changes: Any) -> Envelope:
    """An operator's signed approval of a rollout. `changes` replace fields."""
    fields: dict[str, Any] = {
        "id": f"approve-{rollout.id}",
        "workspace": rollout.workspace,
        "issued_at": at,
        "expires_at": at + timedelta(hours=1),
        "rollout": rollout.id,
        "start": hashlib.sha256(envelope.payload_of(rollout.created.envelope)).hexdigest(),
    }
    command = RolloutApprove(**(fields | changes))
    return envelope.seal(envelope.COMMAND, msgspec.json.encode(command), key)


class World:
    """One workspace with hosts, its journal in `log`, and the desired states that were written in `desired`."""

    def __init__(self, hosts: int | dict[str, dict[str, str]] = 4) -> None:
        self.labels = {f"h{n}": {} for n in range(hosts)} if isinstance(hosts, int) else hosts
        self.records = set(self.labels)
        self.workspace = Workspace("prod")
        self.log: list[bytes] = []
        self.now = T0
        self.desired: dict[str, list[DesiredState]] = {}
        self.seqs: dict[str, int] = {}
        self.most_in_flight = 0

    def rollout(self, name: str = "r1") -> Rollout:
        return self.workspace.rollouts[name]

    def write(self, rollout: str, *events: journal.AnyEvent) -> None:
        found = self.workspace.rollouts.get(rollout)
        chain = documents.Chain.of(found) if found else documents.Chain("prod", rollout, 0, "")
        drafts = [chain.seal(event, self.now, "") for event in events]
        count, head = documents.extended(self.workspace, drafts)
        for event in events:
            if isinstance(event, journal.Assigned):
                assert found is not None
                states = documents.desired(
                    self.workspace, found, event, head=head, links=count, records=lambda h: None,
                    environment="production", at=self.now,
                )  # fmt: skip
                for state in list(states):
                    before = self.desired.setdefault(state.host, [])
                    assert not before or state.generation > before[-1].generation
                    before.append(state)
        for draft in drafts:
            assert fold(self.workspace, draft.data) is not None
            self.log.append(draft.data)

    def create(self, rollout: str = "r1", *, approvals_needed: int = 0, **changes: Any) -> Rollout:
        start = start_command(rollout, self.now, **changes)
        rolloutplan.check(start)
        self.write(
            rollout,
            journal.Created(
                envelope=envelope.seal(envelope.COMMAND, msgspec.json.encode(start), OPERATOR),
                command=start.id,
                keyids=(OPERATOR.keyid,),
                operators=("ada",),
                members=rolloutplan.members(start, self.labels),
                module=start.module,
                version=start.version,
                package="" if start.scope.absent else start.scope.packages[start.version],
                size=100,
                policy=start.scope.policy,
                policy_serial=start.scope.policy_serial,
                traceparent="00-" + "1" * 32 + "-" + "2" * 16 + "-01",
                approvals_needed=approvals_needed,
            ),
        )
        return self.rollout(rollout)

    def approve(self, rollout: str = "r1", by: str = "ben") -> None:
        """Another operator approves it, and activation found that in order."""
        signed = approval_command(self.rollout(rollout), self.now)
        self.write(rollout, journal.Approved(envelope=signed, keyids=(APPROVER.keyid,), operators=(by,)))

    def verdict(
        self, rollout: str = "r1", refused: dict[str, Refusal] | None = None, delivery: Refusal | None = None
    ) -> None:
        for service in ("eligibility", "delivery"):
            self.say(
                verdicts=[
                    Verdict(
                        rollout=rollout, workspace="prod", service=service, at=self.now,
                        refused=refused or {} if service == "eligibility" else {},
                        refusal=delivery if service == "delivery" else None,
                    )
                ]
            )  # fmt: skip

    def say(self, statuses: Any = (), presences: Any = (), verdicts: Any = ()) -> bool:
        found = facts.events(self.workspace, statuses, presences, verdicts)
        for rollout, events in found.items():
            self.write(rollout, *events)
        return bool(found)

    def decide(self) -> list[journal.AnyEvent]:
        """Decide until there is nothing more to decide."""
        made: list[journal.AnyEvent] = []
        for _ in range(1000):
            step: list[journal.AnyEvent] = []
            for name in list(self.workspace.attention):
                rollout = self.rollout(name)
                events = rules.decide(self.workspace, rollout, self.now, self.records)
                if events:
                    self.write(name, *events)
                if rollout.waves and rollout.state in (State.RUNNING, State.PAUSED):
                    self.most_in_flight = max(self.most_in_flight, rollout.in_flight)
                    assert rollout.in_flight <= rules.capacity(rollout)
                step.extend(events)
            if not step:
                return made
            made.extend(step)
        raise AssertionError("it never stops deciding")

    def begin(self, rollout: str = "r1", **changes: Any) -> Rollout:
        """Created, judged well, and decided as far as it goes."""
        found = self.create(rollout, **changes)
        self.verdict(rollout)
        self.decide()
        return found

    def status(
        self, host: str, phase: Phase, promoted: Running | None, *, generation: int | None = None,
        code: Code | None = None, health: Any = "ok", incarnation: str = "one", seq: int | None = None,
        module: str = "firewall", empty: bool = False, document: int | None = None,
        doubt: Code | None = None,
    ) -> Status:  # fmt: skip
        if seq is None:
            seq = self.seqs[host] = self.seqs.get(host, 0) + 1
        last = self.desired[host][-1] if host in self.desired else None
        entry = next((m for m in last.modules if m.module == module), None) if last else None
        said = ModuleStatus(
            module=module,
            phase=phase,
            generation=generation if generation is not None else (entry.generation if entry else 0),
            promoted=promoted,
            health=health,
            enforcing=promoted is not None,
            refusal=Refusal(code, "because") if code else None,
        )
        return Status(
            host=host, workspace="prod", incarnation=incarnation, seq=seq, at=self.now, agent="ok",
            generation=document if document is not None else (last.generation if last else 0), modules=() if empty else (said,),
            refusal=Refusal(doubt, "because") if doubt else None,
        )  # fmt: skip

    def report(self, host: str, phase: Phase, promoted: Running | None, **more: Any) -> bool:
        """A host says so; True where that was news."""
        return self.say(statuses=[self.status(host, phase, promoted, **more)])

    def wanted(self, host: str, module: str = "firewall") -> Running | None:
        """What the host was last told to run."""
        return next(m.running for m in self.desired[host][-1].modules if m.module == module)

    def obey(self, *hosts: str) -> None:
        """These hosts (default: all in flight or returning) promote what they were told."""
        for rollout in list(self.workspace.rollouts.values()):
            for progress in rollout.hosts.values():
                in_work = progress.standing in (Standing.ASSIGNED, Standing.RETURNING)
                if in_work and (not hosts or progress.host in hosts):
                    module = rollout.created.module
                    wanted = self.wanted(progress.host, module)
                    phase = Phase.PROMOTED if wanted else Phase.REMOVED
                    self.report(progress.host, phase, wanted, module=module)

    def lose(self, *hosts: str) -> None:
        for host in hosts:
            self.say(presences=[Presence(host=host, workspace="prod", lost=True, at=self.now)])

    def wait(self, seconds: float) -> list[journal.AnyEvent]:
        self.now += timedelta(seconds=seconds)
        return self.decide()

    def finish(self, rollout: str = "r1") -> State:
        """Everybody obeys, time passes, until it has ended."""
        found = self.rollout(rollout)
        for _ in range(200):
            if found.state not in (State.RUNNING, State.ROLLING_BACK, State.READY):
                break
            self.obey()
            self.decide()
            due = rules.due(found)
            if due is not None and found.in_flight == 0 and found.counts[Standing.RETURNING] == 0:
                self.now = max(self.now, due)
                self.decide()
        return found.state

    def assigned(self, rollout: str = "r1") -> list[str]:
        return [p.host for p in self.rollout(rollout).hosts.values() if p.standing is Standing.ASSIGNED]


def upgraded(hosts: int = 4) -> World:
    """A world in which every host runs 1.0.0 by an earlier rollout `r0`."""
    world = World(hosts)
    world.begin("r0")
    assert world.finish("r0") is State.DONE
    return world
