"""The firewall in the kernel: stage a policy, prove it, commit, confirm, revert; and find it again after a restart.

There are two slots. The active word names one; staging writes the other, which no packet reads. Commit is one store of the
word, with a deadline: unconfirmed by then, the programs themselves judge by the slot before. See programs/firewall.h.
"""

from __future__ import annotations

import ctypes as ct
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Final

from loopback.bpf import layout
from loopback.bpf.objects import Map
from loopback.contracts.abi import Connection
from loopback.contracts.codes import Code, Refused
from loopback.modules.firewall import compile as compiler
from loopback.modules.firewall import counting, live, packets
from loopback.modules.firewall import flows as tracking
from loopback.modules.firewall.attach import Attachment, present
from loopback.modules.firewall.clock import jiffies_per_second
from loopback.modules.firewall.holding import Holding, digest_bytes
from loopback.modules.firewall.model import Action, Direction, FirewallPolicy, Packet, Prefix
from loopback.modules.firewall.packets import Verdict
from loopback.modules.firewall.slots import fill_interfaces
from loopback.modules.firewall.store import Promoted, SlotRecord, Trial

#: After it is first switched on, TCP connections that were there before are taken over.
ADOPTION_S: Final = 300
#: Ten thousand rules take 10 ms, for which nothing else gets the interpreter: whoever asked for the change is told first.
PROMOTE_AFTER_S: Final = 0.05
_TICK_NS: Final = 1 << layout.TICK_SHIFT
_TC_ENTRIES: Final = {Direction.INGRESS: "fw_tc_ingress", Direction.EGRESS: "fw_tc_egress"}
#: Seconds. TCP's and UDP's follow nf_conntrack, but an idle connection lives a day, not five.
_TIMEOUTS: Final = {
    "timeout_syn": 60, "timeout_established": 86400, "timeout_closing": 60, "timeout_udp": 30,
    "timeout_udp_replied": 180, "timeout_icmp": 30, "timeout_other": 600, "timeout_fragment": 30, "touch": 1,
}  # fmt: skip

log = logging.getLogger("loopback.firewall")


class Datapath(Holding):
    """One firewall. `root` is its folder in a bpf file system, None for a private one that touches no packet."""

    def __init__(
        self,
        data: bytes,
        *,
        root: Path | None = None,
        state_dir: Path | None = None,
        interfaces: Sequence[str] = ("*",),
        flows: int | None = None,
        half: int | None = None,
        boot_ns: Callable[[], int] = lambda: time.clock_gettime_ns(time.CLOCK_BOOTTIME),
        random: Callable[[int], bytes] = os.urandom,
        memory: compiler.Memory | None = None,
    ) -> None:
        """Open what is pinned, or make it. `data` is the object file. Raises Refused; nothing is enforced before a commit.

        `half` is the room of a slot in bytes, a power of two, to begin with; it grows with the policies.
        `memory` is what the compiler remembers already.
        """
        self._boot_ns = boot_ns
        super().__init__(data, root, state_dir, interfaces if root else (), flows, half, random)
        self._memory = memory or compiler.Memory()
        self._staged: int | None = None  # epochs
        self._committed: int | None = None
        self._policy: tuple[int, FirewallPolicy] | None = None  # what was staged last, by epoch
        #: What was confirmed last, by this process; the disk has it a little later.
        self._kept: Promoted | None = None
        self.adopted = False
        self._configure()
        if root:
            self._adopt_hooks()

    # ── where it stands ───────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def tick(self) -> int:
        """The deadline's clock now."""
        return int(self._boot_ns() // _TICK_NS)

    @property
    def generation(self) -> int:
        """The epoch in force, in 16 bits, as the kernel decides it now; 0 when nothing is enforced."""
        epoch, fallback, deadline = self.word()
        return fallback if deadline and self.tick >= deadline else epoch

    @property
    def on_trial(self) -> bool:
        """Whether a commit waits for its confirmation, in time or too late."""
        return self.word()[2] != 0

    @property
    def digest(self) -> str | None:
        """The digest of the policy in force."""
        record = self._record(self.generation)
        return record.digest if record else None

    @property
    def filled(self) -> dict[str, int]:
        """How many prefixes each set has that others fill, in the policy in force."""
        return record.filled if (record := self._record(self.generation)) else {}

    def known(self, digest: str) -> FirewallPolicy | None:
        """The policy in force, where it is this one and is remembered."""
        if self._policy is not None and self._policy[0] & 0xFFFF == self.generation:
            return self._policy[1] if digest == self.digest else None
        kept = self._kept or self._store.promoted()
        return kept.policy if kept is not None and kept.digest == digest == self.digest else None

    def _record(self, epoch: int) -> SlotRecord | None:
        if not epoch:
            return None
        head = self._slots.head(epoch & 1)
        if head is None or head.epoch & 0xFFFF != epoch:
            return None
        record = self._store.slots.get(epoch & 1)
        if record is not None and record.epoch == head.epoch:
            return record
        # The state folder was lost: the kernel still knows which policy it is.
        return SlotRecord(epoch=head.epoch, digest=bytes(head.digest).hex())

    # ── start ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _adopt_hooks(self) -> None:
        trial = self._store.trial
        if trial and trial.old == self._pins.name:
            # The version that was on trial is gone and we, its predecessor, were started again: back to our programs.
            if self.on_trial:
                self._normalise(revert=True)
            self.attachments = self._hooks.put(self._programs)
            self._store.set_trial(None)
        self.adopted = self._in_charge() == self._pins.name and self.generation != 0
        if self.adopted:
            self.attachments = self._hooks.put(self._programs)
            if not any(one.problem for one in self.attachments):
                if self._pins.others():
                    self._slots.wait()  # a packet in an entry of theirs needs their core
                self._pins.forget_others(versions=False)

    def _configure(self) -> None:
        """Write the timeouts in jiffies, whose rate only the kernel knows. What another version enforces by is left alone."""
        self._rate = jiffies_per_second(self._clock)
        before = layout.Config.from_buffer_copy(self._maps["config"].lookup(bytes(4)) or b"")
        if not before.timeout_syn or self._pins.root is None or self._in_charge() == self._pins.name:
            self._write_config(self._rate, before.adopt_until)

    def _write_config(self, rate: int, adopt_until: int) -> None:
        values = {name: seconds * rate for name, seconds in _TIMEOUTS.items()}
        self._maps["config"].update(bytes(4), layout.Config(**values, adopt_until=adopt_until))

    def _clock(self) -> layout.Clock:
        clock = layout.Clock()
        self._programs["fw_clock"].run_syscall(clock)
        return clock

    # ── stage ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def stage(self, policy: FirewallPolicy, digest: str = "") -> dict[str, str]:
        """Write a policy to the idle slot and run its tests there. Nothing changes for any packet.

        Raises Refused: POLICY_INVALID, POLICY_TEST_FAILED naming test and line, MODULE_ABI while a commit waits, KERNEL_*.
        """
        self._normalise()
        if self.on_trial:
            raise Refused(
                Code.MODULE_ABI, "a committed policy waits for its confirmation", "confirm or revert it first"
            )
        self._slots.begin()
        others = self._others_live() if self._in_charge() != self._pins.name else []
        if others:
            self._store.read()  # its process may have changed it
        names = tuple(rule.name for rule in policy.rules)
        counters = self._pins.counters
        if len(names) > counters:
            counters = layout.counters_for(len(names))
        identities = self._store.identities
        if counters != self._pins.counters or not identities.keys() >= set(names):
            identities = compiler.assign(self._identities(), names, counters)
        compiled = compiler.compile_policy(
            policy, identities, digest_bytes(digest), self._memory, layout.MAX_HALF
        )
        half = self._half_for(len(compiled.slot))
        if (half, counters) != (self._pins.half, self._pins.counters):
            self._grow(half, counters)
        if identities is not self._store.identities:
            self._clear_counters(identities)
            self._store.set_identities(identities)
        if others:
            self._take_base(others[0])
        epoch = self._write(compiled, policy, digest, self._next_epoch())
        self._staged, self._policy = None, (epoch, policy)
        self.prove(policy, epoch & 1)
        self._staged = epoch
        return {"generation": str(epoch), "rules": str(len(names)), "entries": str(compiled.entries)}

    def _identities(self) -> dict[str, int]:
        """Counters by rule, those of the policy in force last: where room is short, others are given up first."""
        record = self._record(self.generation)
        names = set(record.names) if record else set()
        return dict(sorted(self._store.identities.items(), key=lambda item: item[0] in names))

    def _clear_counters(self, identities: dict[str, int]) -> None:
        """A rule that gets the counter of one that was given up begins at nothing."""
        given_up = {slot for name, slot in self._store.identities.items() if name not in identities}
        counting.forget(self._counted(), given_up & set(identities.values()))

    def _counted(self) -> list[Map]:
        return [self._maps["counters"], *self._set.past]

    def prove(self, policy: FirewallPolicy, index: int) -> None:
        """Run the policy's own tests through the real program on a slot. Raises Refused(POLICY_TEST_FAILED)."""
        verdicts = self.explain([test.packet for test in policy.tests], slot=index)
        for number, (test, verdict) in enumerate(zip(policy.tests, verdicts, strict=True), 1):
            if verdict.action is not test.expect:
                where = f"line {test.line}: " if test.line else ""
                why = f"rule {verdict.rule!r}" if verdict.rule else f"the {verdict.reason}"
                packet = test.packet
                raise Refused(
                    Code.POLICY_TEST_FAILED,
                    f"{where}test {number} expects {test.expect.name.lower()} for {packet.direction.name.lower()} "
                    f"{packet.src} → {packet.dst} protocol {packet.protocol} port {packet.dport}, "
                    f"but {why} says {verdict.action.name.lower()}",
                    "correct the rules or the test",
                )

    def prove_live(
        self, control: Iterable[Connection], ports: Sequence[int], networks: Sequence[Prefix] = ()
    ) -> list[Connection]:
        """Run the live management flows through the real program on the staged slot: the agent's own connections, and the
        sessions of operators at `ports`, with `networks` only those from there. What passes no covered device is left out, and
        so is a session that the policy in force has ended already.

        Without `networks` anybody's session counts, but for whom the policy names: a rule that drops his network means him.
        Returns the sessions that end so. Raises Refused(POLICY_TEST_FAILED) naming the flow that would end; then nothing is
        staged. KERNEL_UNSUPPORTED where the kernel cannot be asked for them.
        """
        if self._staged is None:
            raise Refused(Code.MODULE_ABI, "nothing is staged")
        slot, staged = self._staged & 1, self._staged
        self._staged = None
        try:
            found = [(one, Direction.EGRESS) for one in control]
            found += [(one, Direction.INGRESS) for one in live.sessions(ports) if live.within(one, networks)]
            covered = {device.index: device.name for device in self._hooks.devices()}
            placed = [(one, begun, covered.get(live.device_of(one))) for one, begun in found]
        except OSError as error:
            raise Refused(
                Code.KERNEL_UNSUPPORTED, f"kernel: cannot list connections: {error.strerror}"
            ) from None
        meant = []
        for one, begun, device in placed:
            if device is None:
                continue
            with memoryview(self._maps["flows"].memory()) as entries:
                flow = live.flow_of(one, entries, self._clock().jiffies, self._rate, {})
            asked = live.packets(one, begun, device, flow, covered)
            operator = begun is Direction.INGRESS
            before = self.explain(asked, slot=layout.PROBE_ACTIVE) if operator else []
            after = self.explain(asked, slot=slot)
            for place, (packet, verdict) in enumerate(zip(asked, after, strict=True)):
                if verdict.action is Action.ACCEPT or (operator and before[place].action is Action.DROP):
                    continue
                if operator and not networks and self._names_peer(verdict.rule, packet.direction):
                    meant.append(one)
                    break
                raise live.would_end(one, operator, packet, verdict)
        self._staged = staged
        return meant

    def _names_peer(self, name: str | None, direction: Direction) -> bool:
        rules = self._policy[1].rules if self._policy else ()
        return any(rule.name == name and live.names_peer(rule, direction) for rule in rules)

    # ── commit, confirm, revert ───────────────────────────────────────────────────────────────────────────────────────────

    def commit(self, trial_s: float) -> None:
        """Switch to the staged policy, on trial for `trial_s` seconds; 0 or less keeps it at once.

        Programs of another version on the devices are replaced by ours first. Raises Refused: MODULE_ABI when nothing is
        staged, KERNEL_* when a device cannot be covered; then nothing has changed.
        """
        if self._staged is None:
            raise Refused(Code.MODULE_ABI, "nothing is staged")
        epoch, before = self._staged, self.word()[0]
        if epoch & 1 == before & 1 or not self._slots.is_ours(epoch & 1):
            self._staged = None
            raise Refused(Code.MODULE_ABI, "another process has staged a policy since", "stage it again")
        first = self._attach(before)
        deadline = 0
        if trial_s > 0:
            deadline = -(-(self._boot_ns() + round(trial_s * 1e9)) // _TICK_NS)
        self._maps["active"].store_word(layout.active_word(epoch, before, deadline))
        self._slots.disturb()
        self._staged, self._committed = None, epoch
        if first and self._pins.root is not None:
            self._take_over()
        if not deadline:
            self._keep()

    def _attach(self, before: int) -> bool:
        """Have our programs on every device, under the epoch that holds `before`. Whether no flow is known yet."""
        others = self._others_live() if self._pins.root else []
        if others:
            self._store.set_trial(Trial(old=others[0], new=self._pins.name))
        first = before == 0 or bool(others and not self._pins.shares(others[0], "flows", self._maps["flows"]))
        if first:
            self._write_config(self._rate, self.tick + ADOPTION_S * 10**9 // _TICK_NS)
        if self._pins.root is None:
            return first
        self.attachments = self._hooks.put(self._programs)
        failed = [a for a in self.attachments if a.problem]
        if failed:
            self._put_back()
            raise Refused(Code.KERNEL_REFUSED, f"kernel: device {failed[0].device}: {failed[0].problem}")
        if others:
            self._slots.wait()  # a packet may be under way in a program whose slots know nothing of the new epoch
        return first

    def _take_over(self) -> None:
        """Show the programs a segment of each connection that is there already, as from the side that began it: so its flow is
        known the right way round, whoever speaks next, and however late."""
        programs = {way: self._programs[name] for way, name in _TC_ENTRIES.items()}
        try:
            covered = {device.index: device.name for device in self._hooks.devices()}
            for one, begun in live.connections():
                device = live.device_of(one)
                if device in covered:
                    segment = live.beginning(one, begun, covered[device], packets.ACK)
                    programs[begun].run(packets.frame(segment), context=packets.skb_on(device))
        except (OSError, ValueError, Refused) as error:
            log.warning("connections that were there before are known by their next packet only: %s", error)

    def confirm(self) -> None:
        """Keep what was committed. Raises Refused(HOST_UNCONFIRMED) when the deadline has passed: it holds no more."""
        epoch, _fallback, deadline = self.word()
        if self._committed is not None and self._committed & 0xFFFF != epoch:
            raise Refused(Code.HOST_UNCONFIRMED, "what was committed does not hold any more")
        if deadline:
            if self.tick + 1 >= deadline:
                self.revert()
                raise Refused(
                    Code.HOST_UNCONFIRMED, "the deadline has passed: the kernel returned to what held before"
                )
            self._maps["active"].store_word(layout.active_word(epoch))
        self._keep()

    def _keep(self) -> None:
        record = self._record(self.word()[0])
        self._store.set_trial(None)
        self._pins.forget_others()
        if record is not None and self._policy is not None and self._policy[0] == record.epoch:
            self._kept = kept = Promoted(epoch=record.epoch, digest=record.digest, policy=self._policy[1])
            self._threads.submit(self._promote, kept)

    def _promote(self, kept: Promoted) -> None:
        time.sleep(PROMOTE_AFTER_S)
        try:
            self._store.set_promoted(kept)
        except OSError as error:
            log.warning("the policy in force could not be kept for a later release: %s", error.strerror)

    def revert(self) -> None:
        """Return to what held before the commit; harmless when nothing is on trial. Raises Refused(KERNEL_*)."""
        self._staged = self._committed = None
        was = self.on_trial
        self._normalise(revert=True)
        if was or self._store.trial:
            self._put_back()

    def _put_back(self) -> None:
        """The programs that were there before ours, or none."""
        trial = self._store.trial
        if trial and trial.new == self._pins.name:
            self._put_other(trial.old)
            self._store.set_trial(None)
        elif self.word()[0] == 0:
            self._hooks.take_away()
            self.attachments = []

    def _put_other(self, name: str) -> None:
        programs = self._pins.programs_of(name)
        try:
            self.attachments = self._hooks.put(programs)
        finally:
            for program in programs.values():
                program.close()

    def _normalise(self, *, revert: bool = False) -> None:
        """Write down what the kernel decided when a deadline passed; with `revert`, decide it now."""
        _epoch, fallback, deadline = self.word()
        if deadline and (revert or self.tick >= deadline):
            self._maps["active"].store_word(layout.active_word(fallback))

    # ── devices ───────────────────────────────────────────────────────────────────────────────────────────────────────────

    def cover(self) -> list[Attachment]:
        """Cover devices that appeared, by the version in charge; tell the policies their numbers. Raises Refused."""
        holder = self._in_charge()
        if self._pins.root is not None and (self.word()[0] or holder != self._pins.name):
            for index in range(layout.SLOTS):
                inner, record = self._slots.interfaces(index), self._store.slots.get(index)
                if inner is not None and record is not None:
                    fill_interfaces(inner, record.interfaces)
            if holder == self._pins.name:
                self.attachments = self._hooks.put(self._programs)
            else:
                self._put_other(holder)
        return self.attachments

    def uncovered(self) -> list[str]:
        """Devices that our programs do not guard, and wanted ones that do not exist. Raises Refused."""
        return self._hooks.covered(self._programs) + self._hooks.missing()

    # ── questions ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def explain(self, asked: Iterable[Packet], *, slot: int | None = None) -> list[Verdict]:
        """What the real program says of packets: by `slot`, by what is staged, or else by what is in force.

        Raises Refused(POLICY_INVALID) for a packet that cannot be.
        """
        return self.explain_frames(map(packets.framed, asked), slot=slot)

    def explain_frames(self, asked: Iterable[packets.Frame], *, slot: int | None = None) -> list[Verdict]:
        """The same for frames as they were captured. Raises Refused(POLICY_INVALID) for one that is too long to ask about."""
        if slot is None:
            slot = self._staged & 1 if self._staged else layout.PROBE_ACTIVE
        record = self._store.slots.get((self.generation if slot == layout.PROBE_ACTIVE else slot) & 1)
        interfaces, names = (record.interfaces, record.names) if record else ((), ())
        return packets.judged(self._programs["fw_probe"], asked, slot, interfaces, names)

    def flows(self) -> Iterator[tracking.Flow]:
        """The live flows of the connection table."""
        tags, entries = (memoryview(self._maps[name].memory()) for name in ("flow_tags", "flows"))
        return tracking.read(tags, entries, self._clock().jiffies, self._rate, self.rule_names())

    def diff(self) -> list[tracking.Change]:
        """Which live flows the staged policy would judge otherwise than the one in force, by the rules that do.

        Every flow's first packet runs through the real program. Raises Refused(MODULE_ABI) when nothing is staged, KERNEL_*.
        """
        if self._staged is None:
            raise Refused(Code.MODULE_ABI, "nothing is staged")
        record, staged = self._record(self.generation), self._staged & 1
        return tracking.changes(
            self.flows() if record else (),
            record.epoch if record else 0,
            {device.index: device.name for device in present()},
            lambda asked: self.explain(asked, slot=layout.PROBE_ACTIVE),
            lambda asked: self.explain(asked, slot=staged),
        )

    def counters(self, most: int | None = None) -> dict[str, tuple[int, int]]:
        """(packets, bytes) by rule, of `most` ever counted or of all. They survive changes of policy, size and version."""
        return counting.of_rules(self._counted(), dict(islice(self._store.identities.items(), most)))

    def totals(self) -> dict[str, int]:
        """Packets by `direction.reason.verdict`, by `slot.<n>.<verdict>`, and the plain counters."""
        return counting.totals(self._maps["totals"])

    def sample(self, one_in: int) -> None:
        """Have the programs report one in so many packets for a shadow, 0 for none, until another policy is in force."""
        for index in range(layout.SLOTS):
            rate = one_in if self.generation and index == self.generation & 1 else 0
            at = index * self._pins.half + layout.Slot.shadow.offset
            ct.c_uint16.from_buffer(self._maps["arena"].memory(), at).value = min(rate, layout.MAX_SHADOW)

    @property
    def events(self) -> Map:
        """The ring buffer of sampled packets."""
        return self._maps["events"]

    def rule_names(self) -> dict[int, str]:
        """Rule names by counter slot."""
        return {slot: name for name, slot in self._store.identities.items()}

    # ── end ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def remove(self) -> None:
        """Take everything out of the kernel: nothing is enforced any more. Raises Refused."""
        self._maps["active"].store_word(0)
        self._hooks.take_away()
        self._pins.remove()
        self._store.forget()
