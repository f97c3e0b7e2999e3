"""The host's own settings for the firewall: what cannot be is refused, and what nobody knows is named."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import cast

import pytest

from loopback.bpf import layout, rtnl
from loopback.contracts import abi
from loopback.contracts.codes import Code, Refused
from loopback.modules.firewall import attach, module
from loopback.modules.firewall.datapath import Datapath


@pytest.mark.parametrize("flows", [0, -1, "100000", 1.5, True, layout.MAX_FLOWS + 1])
def test_a_size_of_the_flow_table_that_cannot_be_is_refused_and_not_left_out_of_account(
    flows: object,
) -> None:
    with pytest.raises(Refused, match="flows = ") as caught:
        module._flows_of({"flows": flows})
    assert caught.value.code is Code.CONFIG_INVALID
    assert module._flows_of({"flows": 4096}) == 4096
    assert module._flows_of({}) is None


def test_a_setting_with_a_typing_error_is_named_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "LOOPBACK_PACKAGE_DIR", str(tmp_path)
    )  # no package: it stops before the kernel is asked
    asked = abi.Configure(
        host="h", workspace="w", state_dir=str(tmp_path), settings={"interface": ["eth0"], "shadow": 4}
    )
    with caplog.at_level(logging.WARNING), pytest.raises(Refused, match="cannot read"):
        asyncio.run(module.FirewallModule().configure(asked))
    assert [record.getMessage() for record in caplog.records] == [
        "[modules.firewall] interface: there is no such setting; did you mean 'interfaces'?"
    ]


async def test_devices_that_cannot_be_listed_are_told_and_end_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unheard() -> list[object]:
        raise TimeoutError("timed out")

    class Unlisted:
        attachments: tuple[object, ...] = ()

        def cover(self) -> list[object]:
            return list(attach.present())

    monkeypatch.setattr(rtnl, "devices", unheard)
    firewall = module.FirewallModule()
    firewall._datapath = cast("Datapath", Unlisted())
    firewall._on_devices()
    assert firewall._cover is not None
    await firewall._cover
    [event] = firewall._events
    assert event.kind == "firewall.uncovered" and event.attributes["code"] == Code.KERNEL_UNSUPPORTED
    assert "timed out" in str(event.attributes["reason"])
