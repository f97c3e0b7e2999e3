"""The firewall in the kernel: stage a policy, prove it, commit, confirm, revert; and find it again after a restart.

There are two slots. The active word names one; staging writes the other, which no packet reads. Commit is one store of the
word, with a deadline: unconfirmed by then, the programs themselves judge by the slot before. See programs/firewall.h.
"""

from __future__ import annotations

import ctypes as ct
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

from loopback.bpf import layout, loader, rtnl
from loopback.bpf.loader import Map
from loopback.contracts.codes import Code, Refused
from loopback.modules.firewall import compile as compiler
from loopback.modules.firewall import packets
from loopback.modules.firewall.attach import Attachment, Attachments
from loopback.modules.firewall.clock import jiffies_per_second
from loopback.modules.firewall.model import Action, Direction, FirewallPolicy, Packet
from loopback.modules.firewall.packets import Verdict
from loopback.modules.firewall.pins import Pins
from loopback.modules.firewall.store import SlotRecord, Store, Trial

ADOPTION_S: Final = (
    300  # after it is first switched on, TCP connections that were there before are taken over
)
_TICK_NS: Final = 1 << layout.TICK_SHIFT
#: Seconds. TCP's and UDP's follow nf_conntrack, but an idle connection lives a day, not five.
_TIMEOUTS: Final = {
    "timeout_syn": 60, "timeout_established": 86400, "timeout_closing": 60, "timeout_udp": 30,
    "timeout_udp_replied": 180, "timeout_icmp": 30, "timeout_other": 600, "timeout_fragment": 30, "touch": 1,
}  # fmt: skip
_BATCH: Final = 65536  # entries per update of a trie


class Datapath:
    """One firewall. `root` is its folder in a bpf file system, None for a private one that touches no packet."""

    def __init__(
        self,
        data: bytes,
        *,
        root: Path | None = None,
        state_dir: Path | None = None,
        interfaces: Sequence[str] = ("*",),
        flows: int | None = None,
        boot_ns: Callable[[], int] = lambda: time.clock_gettime_ns(time.CLOCK_BOOTTIME),
    ) -> None:
        """Open what is pinned, or make it. `data` is the object file. Raises Refused; nothing is enforced before a commit."""
        self._boot_ns = boot_ns
        self._store = Store(state_dir)
        self._pins = Pins(root, data)
        self._loaded, there = self._pins.open(flows)
        self._maps, self._programs = self._loaded.maps, self._loaded.programs
        self._hooks = Attachments(self._pins, interfaces if root else ())
        self._inner: dict[str, Map] = {}
        self._staged: int | None = None  # epochs
        self._committed: int | None = None
        self.attachments: list[Attachment] = []
        self.adopted = False
        if root:
            self._hooks.adopt()
            if there:
                self._adopt_slots()
        self._configure(there)
        if root:
            self._adopt_hooks()

    # ── where it stands ───────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def tick(self) -> int:
        """The deadline's clock now."""
        return int(self._boot_ns() // _TICK_NS)

    def word(self) -> tuple[int, int, int]:
        """(epoch, fallback, deadline in ticks) of the active word."""
        return layout.split_word(self._maps["active"].load_word())

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

    def _record(self, epoch: int) -> SlotRecord | None:
        if not epoch:
            return None
        head = self._head(epoch & 1)
        if head is None or head.epoch & 0xFFFF != epoch:
            return None
        record = self._store.slots.get(epoch & 1)
        if record is not None and record.epoch == head.epoch:
            return record
        # The state folder was lost: the kernel still knows which policy it is.
        return SlotRecord(epoch=head.epoch, digest=bytes(head.digest).hex())

    def _head(self, index: int) -> layout.SlotHead | None:
        inner = self._inner.get(f"slot-{index}")
        data = inner.lookup(bytes(4)) if inner else None
        return layout.SlotHead.from_buffer_copy(data) if data else None

    # ── start ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _adopt_slots(self) -> None:
        for index in range(layout.SLOTS):
            for kind in ("slot", "sets4", "sets6", "interfaces"):
                name = f"{kind}-{index}"
                inner = self._pins.inner(name)
                if inner is not None:
                    self._inner[name] = inner

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

    def _in_charge(self) -> str:
        """Whose programs guard the devices: ours, unless another version's do, which then hold until a commit."""
        others = self._others_live()
        ours = self._pins.program_sets().get(self._pins.name, set()) & self._hooks.live()
        return others[0] if others and not ours else self._pins.name

    def _others_live(self) -> list[str]:
        live = self._hooks.live()
        return [n for n, ids in self._pins.program_sets().items() if n != self._pins.name and ids & live]

    def _configure(self, there: bool) -> None:
        """Write the timeouts in jiffies, whose rate only the kernel knows."""
        rate = jiffies_per_second(self._clock)
        before = self._maps["config"].lookup(bytes(4)) if there else None
        adopt = layout.Config.from_buffer_copy(before).adopt_until if before else 0
        self._write_config(rate, adopt)
        self._rate = rate

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
        identities = compiler.assign(self._identities(), [rule.name for rule in policy.rules])
        compiled = compiler.compile_policy(policy, identities, _digest_bytes(digest))
        self._clear_counters(identities)
        self._store.set_identities(identities)
        self._base_for_other_layout()
        epoch = self._write(compiled, policy, digest)
        self._staged = None
        self.prove(policy, epoch & 1)
        self._staged = epoch
        return {"generation": str(epoch), "rules": str(len(policy.rules)), "entries": str(compiled.entries)}

    def _identities(self) -> dict[str, int]:
        """Counters by rule, those of the policy in force last: where room is short, others are given up first."""
        record = self._record(self.generation)
        names = {rule.name for rule in record.policy.rules} if record and record.policy else set()
        return dict(sorted(self._store.identities.items(), key=lambda item: item[0] in names))

    def _clear_counters(self, identities: dict[str, int]) -> None:
        """A rule that gets the counter of one that was given up begins at nothing."""
        given_up = {slot for name, slot in self._store.identities.items() if name not in identities}
        nothing = bytes(ct.sizeof(layout.Counter) * loader.possible_cpus())
        for slot in given_up & set(identities.values()):
            self._maps["counters"].update(struct.pack("=I", slot), nothing)

    def _write(self, compiled: compiler.Compiled, policy: FirewallPolicy, digest: str) -> int:
        """Fill the idle slot. The epoch it got."""
        active = self.word()[0]
        index = (active & 1) ^ 1
        epochs = [head.epoch for i in range(layout.SLOTS) if (head := self._head(i))]
        epoch: int = max([*epochs, active, self._store.last_epoch]) + 1
        while epoch & 1 != index or not epoch & 0xFFFF:
            epoch += 1
        slot = Map.create(loader.MAP_ARRAY, "slot", 4, ct.sizeof(layout.Slot), 1)
        slot.update(bytes(4), compiled.with_epoch(epoch))
        sets4 = _trie("sets4", layout.SetKey4, compiled.set_keys4, compiled.set_values4)
        sets6 = _trie("sets6", layout.SetKey6, compiled.set_keys6, compiled.set_values6)
        interfaces = Map.create(loader.MAP_HASH, "interfaces", 4, 8, 1024)
        record = SlotRecord(epoch=epoch, digest=digest, interfaces=compiled.interfaces, policy=policy)
        self._fill_interfaces(interfaces, record)
        self._store.set_slot(index, record)
        # A packet that read the word before the last commit may still be under way in this slot: wait for it, then replace.
        self._maps["fence"].update_fd(0, interfaces)
        self._maps["slots"].update_fd(index, slot)
        self._maps["sets4"].update_fd(index, sets4)
        self._maps["sets6"].update_fd(index, sets6)
        self._maps["interfaces"].update_fd(index, interfaces)
        for name, inner in (
            (f"slot-{index}", slot),
            (f"sets4-{index}", sets4),
            (f"sets6-{index}", sets6),
            (f"interfaces-{index}", interfaces),
        ):
            self._pins.replace(name, inner)
            if name in self._inner:
                self._inner[name].close()
            self._inner[name] = inner
        return epoch

    def _base_for_other_layout(self) -> None:
        """Programs of another layout enforce: give our fresh maps their policy, so that a fallback is not "nothing"."""
        base = self._store.promoted
        if self.word()[0] or base is None or base.policy is None or not self._others_live():
            return
        identities = self._store.identities | compiler.assign(
            self._store.identities, [rule.name for rule in base.policy.rules]
        )
        compiled = compiler.compile_policy(base.policy, identities, _digest_bytes(base.digest))
        epoch = self._write(compiled, base.policy, base.digest)
        self._write_config(self._rate, self.tick + ADOPTION_S * 10**9 // _TICK_NS)
        self._maps["active"].store_word(layout.active_word(epoch))

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

    # ── commit, confirm, revert ───────────────────────────────────────────────────────────────────────────────────────────

    def commit(self, trial_s: float) -> None:
        """Switch to the staged policy, on trial for `trial_s` seconds; 0 or less keeps it at once.

        Programs of another version on the devices are replaced by ours first. Raises Refused: MODULE_ABI when nothing is
        staged, KERNEL_* when a device cannot be covered; then nothing has changed.
        """
        if self._staged is None:
            raise Refused(Code.MODULE_ABI, "nothing is staged")
        epoch, before = self._staged, self.word()[0]
        if epoch & 1 == before & 1 or not self._is_ours(epoch & 1):
            self._staged = None
            raise Refused(Code.MODULE_ABI, "another process has staged a policy since", "stage it again")
        self._attach()
        if before == 0:
            self._write_config(self._rate, self.tick + ADOPTION_S * 10**9 // _TICK_NS)
        deadline = 0
        if trial_s > 0:
            deadline = -(-(self._boot_ns() + round(trial_s * 1e9)) // _TICK_NS)
        self._maps["active"].store_word(layout.active_word(epoch, before, deadline))
        self._staged, self._committed = None, epoch
        if not deadline:
            self._keep()

    def _is_ours(self, index: int) -> bool:
        """Whether the slot still holds what we wrote to it."""
        pinned = self._pins.inner(f"slot-{index}")
        if pinned is None:
            return self._pins.root is None
        pinned.close()
        return pinned.id == self._inner[f"slot-{index}"].id

    def _attach(self) -> None:
        if self._pins.root is None:
            return
        if others := self._others_live():
            self._store.set_trial(Trial(old=others[0], new=self._pins.name))
        self.attachments = self._hooks.put(self._programs)
        failed = [a for a in self.attachments if a.problem]
        if failed:
            self._put_back()
            raise Refused(Code.KERNEL_REFUSED, f"kernel: device {failed[0].device}: {failed[0].problem}")

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
        if record is not None:
            self._store.set_promoted(record)
        self._store.set_trial(None)
        self._pins.forget_others()

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
                inner, record = self._inner.get(f"interfaces-{index}"), self._store.slots.get(index)
                if inner is not None and record is not None:
                    self._fill_interfaces(inner, record)
            if holder == self._pins.name:
                self.attachments = self._hooks.put(self._programs)
            else:
                self._put_other(holder)
        return self.attachments

    def uncovered(self) -> list[str]:
        """Devices that our programs do not guard, and wanted ones that do not exist. Raises Refused."""
        return self._hooks.covered(self._programs) + self._hooks.missing()

    def _fill_interfaces(self, inner: Map, record: SlotRecord) -> None:
        if not record.interfaces:
            return
        bits = {name: 1 << place for place, name in enumerate(record.interfaces)}
        wanted = {device.index: bits[device.name] for device in rtnl.devices() if device.name in bits}
        for key in list(inner.keys()):
            if struct.unpack("=I", key)[0] not in wanted:
                inner.delete(key)
        for index, bit in wanted.items():
            inner.update(struct.pack("=I", index), struct.pack("=Q", bit))

    # ── questions ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def explain(self, asked: Iterable[Packet], *, slot: int | None = None) -> list[Verdict]:
        """What the real program says of packets: by `slot`, by what is staged, or else by what is in force.

        Raises Refused(POLICY_INVALID) for a packet that cannot be.
        """
        if slot is None:
            slot = self._staged & 1 if self._staged else layout.PROBE_ACTIVE
        record = self._store.slots.get((self.generation if slot == layout.PROBE_ACTIVE else slot) & 1)
        names = [rule.name for rule in record.policy.rules] if record and record.policy else []
        bits = {name: 1 << place for place, name in enumerate(record.interfaces if record else ())}
        return [self._judge(packet, slot, names, bits.get(packet.iface, 0)) for packet in asked]

    def _judge(self, packet: Packet, slot: int, names: Sequence[str], interfaces: int) -> Verdict:
        try:
            data = packets.frame(packet)
        except (ValueError, struct.error) as error:
            raise Refused(Code.POLICY_INVALID, f"packet {packet.src} → {packet.dst}: {error}") from None
        state = layout.STATES.get(packet.state, layout.NEW)
        given = packets.question(
            data, slot=slot, direction=packet.direction, state=state, interfaces=interfaces
        )
        found = packets.answer(self._programs["fw_probe"].run(given)[1])
        rule = names[found.order] if found.order < len(names) else None
        return Verdict(Action(found.verdict), rule, layout.REASONS[found.reason], found.epoch)

    def counters(self) -> dict[str, tuple[int, int]]:
        """(packets, bytes) of every rule that was ever counted, by name. They survive changes of policy."""
        cpus = loader.possible_cpus()
        size = ct.sizeof(layout.Counter)
        found = {}
        for name, identity in self._store.identities.items():
            data = self._maps["counters"].lookup(struct.pack("=I", identity), size * cpus) or b""
            each = [layout.Counter.from_buffer_copy(data, at) for at in range(0, len(data), size)]
            found[name] = (sum(c.packets for c in each), sum(c.bytes for c in each))
        return found

    def totals(self) -> dict[str, int]:
        """Packets by `direction.reason.verdict` (those that occurred), by `slot.<n>.<verdict>`, and the plain counters."""
        size = ct.sizeof(layout.Totals)
        data = self._maps["totals"].lookup(bytes(4), size * loader.possible_cpus()) or b""
        found: dict[str, int] = {}
        for at in range(0, len(data), size):
            one = layout.Totals.from_buffer_copy(data, at)
            for direction in Direction:
                for place, reason in enumerate(layout.REASONS):
                    for action in Action:
                        name = f"{direction.name.lower()}.{reason}.{action.name.lower()}"
                        found[name] = found.get(name, 0) + one.packets[direction][place][action]
            for slot in range(layout.SLOTS):
                for action in Action:
                    name = f"slot.{slot}.{action.name.lower()}"
                    found[name] = found.get(name, 0) + one.by_slot[slot][action]
            for name in ("flows_created", "flows_failed", "revalidated", "past_deadline", "events_lost"):
                found[name] = found.get(name, 0) + getattr(one, name)
        return found

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

    def close(self) -> None:
        """Give descriptors back. What is pinned goes on enforcing."""
        self._hooks.close()
        for inner in self._inner.values():
            inner.close()
        self._inner.clear()
        self._loaded.close()


def _digest_bytes(digest: str) -> bytes:
    """A policy's digest as the slot holds it."""
    return bytes.fromhex(digest).ljust(32, b"\0")[:32]


def _trie(name: str, key: type[ct.Structure], keys: bytes, values: bytes) -> Map:
    size, width = ct.sizeof(key), ct.sizeof(layout.SetValue)
    count = len(keys) // size
    trie = Map.create(loader.MAP_LPM, name, size, width, count, loader.NO_PREALLOC)
    for at in range(0, count, _BATCH):
        end = min(at + _BATCH, count)
        trie.update_batch(keys[at * size : end * size], values[at * width : end * width], end - at)
    return trie
