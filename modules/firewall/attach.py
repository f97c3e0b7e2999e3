"""Which program sits on which device, and putting it there.

Ingress is XDP, native or else generic. Where another program holds the XDP slot, or the device has no Ethernet header, it is TC
ingress. Egress is TC. `*` means every device but loopback, which is covered only when it is named.
"""

from __future__ import annotations

import errno
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from loopback.bpf import hooks, rtnl
from loopback.bpf.hooks import TC_EGRESS, TC_INGRESS, SlotTaken, XdpLink
from loopback.bpf.objects import Program
from loopback.bpf.rtnl import Device
from loopback.contracts.codes import Code, Refused
from loopback.modules.firewall.pins import Pins

Ingress = Literal["native", "generic", "tc"]


class Attachment(msgspec.Struct, frozen=True):
    """How a device is covered. `note` says why it is not native XDP; `problem` why it is not covered at all."""

    device: str
    ifindex: int
    ingress: Ingress | None
    note: str = ""
    problem: str = ""


def present() -> list[Device]:
    """Every device of this network namespace. Raises Refused(KERNEL_UNSUPPORTED)."""
    try:
        return rtnl.devices()
    except OSError as error:
        raise Refused(Code.KERNEL_UNSUPPORTED, f"kernel: cannot list devices: {error}") from None


class Attachments:
    """The hooks of one firewall."""

    def __init__(self, pins: Pins, wanted: Sequence[str]) -> None:
        self._pins = pins
        self._wanted = tuple(wanted)
        self._links: dict[int, XdpLink] = {}

    def move(self, pins: Pins) -> None:
        """Go on with the pins of another size."""
        self._pins = pins

    def devices(self) -> list[Device]:
        """The devices that are to be covered now. Raises Refused."""
        return [device for device in present() if self._covers(device)]

    def missing(self) -> list[str]:
        """Names that are wanted and that no device has."""
        there = {d.name for d in self.devices()}
        return [name for name in self._wanted if not set("*?[") & set(name) and name not in there]

    def _covers(self, device: Device) -> bool:
        return any(
            device.name == wanted
            or (set("*?[") & set(wanted) and not device.loopback and fnmatch.fnmatchcase(device.name, wanted))
            for wanted in self._wanted
        )

    def adopt(self) -> None:
        """Take over the links that are pinned. Raises Refused."""
        self._links = self._pins.links()

    def live(self) -> set[int]:
        """The ids of the programs that sit on the covered devices. Raises Refused."""
        found = {link.program_id for link in self._links.values()}
        for device in self.devices():
            found.add(hooks.tc_program(device.index, TC_INGRESS))
            found.add(hooks.tc_program(device.index, TC_EGRESS))
        return found - {0}

    def put(self, programs: Mapping[str, Program]) -> list[Attachment]:
        """Have these programs on every device, in place of any of ours that are there. Problems are told, not raised."""
        wanted = self.devices()
        for index in self._links.keys() - {d.index for d in wanted}:
            self._pins.unpin_link(index)
            self._links.pop(index).close()
        self._leave_others()
        found = [self._put(device, programs) for device in wanted]
        if any(one.problem for one in found):  # a device that went meanwhile is no problem
            wanted = self.devices()
        there = {device.index for device in wanted}
        return [one for one in found if one.ifindex in there]

    def _put(self, device: Device, programs: Mapping[str, Program]) -> Attachment:
        try:
            note = ""
            if device.ethernet:
                mode, note = self._ingress(device, programs)
                self._filter(device, TC_EGRESS, programs["fw_tc_egress"])
            else:
                self._filter(device, TC_INGRESS, programs["fw_l3_ingress"])
                self._filter(device, TC_EGRESS, programs["fw_l3_egress"])
                mode, note = "tc", "no Ethernet header"
            return Attachment(device.name, device.index, mode, note)
        except KeyError as lacking:  # another release's, by other names: what is there stays, and it puts its own when it runs
            return Attachment(
                device.name, device.index, None, problem=f"that release has no program {lacking}"
            )
        except Refused as problem:
            return Attachment(device.name, device.index, None, problem=problem.reason)

    def _ingress(self, device: Device, programs: Mapping[str, Program]) -> tuple[Ingress, str]:
        link = self._links.get(device.index)
        if link is not None and link.ifindex != device.index:
            self._pins.unpin_link(device.index)  # the device is another one under the same number
            self._links.pop(device.index).close()
            link = None
        if link is None:
            if hooks.tc_program(device.index, TC_INGRESS):
                self._filter(device, TC_INGRESS, programs["fw_tc_ingress"])
                return "tc", "the XDP slot was taken"
            try:
                link = XdpLink.create(device.index, programs["fw_xdp"])
            except SlotTaken:
                self._filter(device, TC_INGRESS, programs["fw_tc_ingress"])
                return "tc", "the XDP slot is taken"
            self._pins.pin_link(device.index, link)
            self._links[device.index] = link
        elif link.program_id != programs["fw_xdp"].id:
            link.update(programs["fw_xdp"])
        return link.mode, "" if link.mode == "native" else "the driver has no XDP"

    @staticmethod
    def _filter(device: Device, point: int, program: Program) -> None:
        if hooks.tc_program(device.index, point) != program.id:
            hooks.tc_attach(device.index, point, program)

    def covered(self, programs: Mapping[str, Program]) -> list[str]:
        """The names of devices on which these programs do not sit; empty when all is covered. Raises Refused."""
        ids = {program.id for program in programs.values()}
        bare = []
        for device in self.devices():
            link = self._links.get(device.index)
            inward = link.program_id if link else hooks.tc_program(device.index, TC_INGRESS)
            if link and link.ifindex != device.index:
                inward = 0
            if inward not in ids or hooks.tc_program(device.index, TC_EGRESS) not in ids:
                bare.append(device.name)
        return bare

    def take_away(self) -> None:
        """Detach everything of ours. Raises Refused."""
        for index in list(self._links):
            self._pins.unpin_link(index)
            self._links.pop(index).close()
        for device in self.devices():
            for point in (TC_INGRESS, TC_EGRESS):
                if hooks.tc_program(device.index, point):
                    self._detach(device, point)
        self._leave_others()

    def _leave_others(self) -> None:
        """Take our filters from devices that are not ours to guard any more: renamed, or not wanted by new settings."""
        others = [device for device in present() if not self._covers(device)]
        ours = set().union(*self._pins.program_sets().values()) if others else set()
        for device in others:
            for point in (TC_INGRESS, TC_EGRESS):
                if hooks.tc_program(device.index, point) in ours:
                    self._detach(device, point)

    @staticmethod
    def _detach(device: Device, point: int) -> None:
        try:
            hooks.tc_detach(device.index, point)
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise Refused(Code.KERNEL_REFUSED, f"kernel: taking TC from {device.name}: {error}") from None

    def close(self) -> None:
        """Give descriptors back; what is pinned stays attached."""
        for link in self._links.values():
            link.close()
        self._links.clear()
