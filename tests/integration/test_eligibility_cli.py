"""The operator's own path: `loopback workspace/entitlement/host/hosts/eligibility` against running services."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

import msgspec
import pytest
from support import eventually
from support_cli import Operator, services
from support_fleet import FakeHost, World

from loopback.contracts import envelope, subjects
from loopback.contracts.codes import Code
from loopback.contracts.keys import SigningKey
from loopback.contracts.messages import JournalEntry, WorkspacePut
from loopback.contracts.reports import ModuleStatus, Phase
from loopback.host import config
from loopback.services._runtime.settings import read_identity

pytestmark = pytest.mark.broker


async def test_from_a_workspace_to_a_host_that_may_have_the_module(broker, capsys, tmp_path):
    loopback = Operator(broker, capsys)
    async with services(broker):
        assert (await loopback("workspace", "put", "prod", "--environment", "staging"))[0] == 0
        code, out, _ = await loopback("workspace", "list", "--json")
        assert code == 0
        assert [(w["workspace"], w["environment"]) for w in json.loads(out)] == [("prod", "staging")]
        assert (
            await loopback(
                "entitlement",
                "put",
                "fw-prod",
                "--module",
                "firewall",
                "--versions",
                ">=1,<2",
                "--label",
                "role=web",
            )
        )[0] == 0
        folder = tmp_path / "web-1"
        add = ("host", "add", "web-1", "--label", "role=web", "--address", "192.0.2.7", "--out", str(folder))
        code, out, _ = await loopback(*add, "--interface", "eth7", "--heartbeat", "0.5")
        assert code == 0
        made = config.load(folder / "host.toml")
        assert out.strip() == str(folder / "host.toml")
        assert (made.host, made.workspace, made.heartbeat_s) == ("web-1", "prod", 0.5)
        assert made.modules == {"firewall": {"interfaces": ["eth7"]}}
        assert made.creds.stat().st_mode & 0o777 == 0o600
        assert made.root.read_bytes() == (broker.home / "tuf" / "root.json").read_bytes()
        code, _, err = await loopback(*add)
        assert code == 2 and "already" in err and "--replace" in err

        code, out, _ = await loopback("eligibility", "explain", "web-1", "firewall")
        assert code == 1 and Code.ELIGIBILITY_NO_RELEASE in out
        world = World(broker)
        await world.release("1.2.0", kernel="5.17")
        host = FakeHost(world, "web-1", "prod", SigningKey.from_nkey(read_identity(made.creds).seed))
        await world.connect(host, made.creds)
        await host.say(host.inventory(kernel="6.1"))
        await host.say(host.status(ModuleStatus(module="firewall", phase=Phase.IDLE, generation=0)))
        await host.say(host.heartbeat(interval_s=60))

        async def eligible() -> str:
            code, out, _ = await loopback("eligibility", "explain", "web-1", "firewall", "--version", "1.2.0")
            return out if code == 0 else ""

        out = await eventually(eligible)
        assert "web-1 may have firewall 1.2.0" in out
        assert '✓ entitlement   "fw-prod"' in out and "✓ kernel        ≥ 5.17 (host has 6.1)" in out

        async def seen() -> bool:
            code, out, _ = await loopback("hosts", "--json")
            (row,) = json.loads(out)
            return code == 0 and row["state"] == "ok" and row["kernel"] == "6.1" and bool(row["modules"])

        assert await eventually(seen)
        code, out, _ = await loopback("hosts")
        assert "web-1  prod       ok     0.1.0" in out
        code, out, _ = await loopback("host", "show", "web-1")
        assert code == 0 and "may have   firewall 1.2.0" in out

        assert (await loopback("entitlement", "remove", "fw-prod"))[0] == 0
        code, _, err = await loopback("entitlement", "remove", "fw-prod")
        assert code == 2 and "no entitlement" in err

        async def refused() -> str:
            code, out, _ = await loopback("eligibility", "explain", "web-1", "firewall", "--json")
            return out if code == 1 else ""

        answer = json.loads(await eventually(refused))
        assert (answer["eligible"], answer["refusal"]["code"]) == (False, Code.ELIGIBILITY_NO_ENTITLEMENT)
        assert (await loopback("host", "remove", "web-1"))[0] == 0
        code, out, _ = await loopback("hosts", "--json")
        assert json.loads(out) == []
        await world.close()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("entitlement", "put", "e", "--module", "m", "--versions", "newest"), "versions: 'newest'"),
        (("entitlement", "put", "e", "--module", "m", "--label", "nonsense"), "--label 'nonsense'"),
        (("host", "add", "Web 1", "--out", "/nowhere"), "host: 'Web 1'"),
        (("host", "add", "web-1", "--address", "here", "--out", "/nowhere"), "--address 'here'"),
        (("workspace", "put", "*"), "the name '*'"),
        (("entitlement", "put", "*", "--module", "m"), "the name '*'"),
        (("host", "show", "web-9"), "no record names the host 'web-9'"),
    ],
)
async def test_a_mistake_is_one_clear_message_and_exit_code_2(broker, capsys, words, said, caplog):
    caplog.set_level(logging.ERROR)
    loopback = Operator(broker, capsys)
    async with services(broker):
        assert (await loopback("workspace", "put", "prod"))[0] == 0
        code, out, err = await loopback(*words)
    assert (code, out) == (2, "")
    assert said in err and "next:" in err and "Traceback" not in err


async def test_a_command_that_nobody_trusted_signed_changes_nothing_and_is_in_the_journal(broker, capsys):
    loopback = Operator(broker, capsys)
    async with services(broker):
        assert (await loopback("workspace", "put", "prod", "--environment", "staging"))[0] == 0
        now = datetime.now(UTC)
        command = WorkspacePut(
            id="evil", workspace="prod", issued_at=now, expires_at=now, environment="production"
        )
        data = envelope.seal_bytes(envelope.COMMAND, msgspec.json.encode(command), SigningKey.generate())
        operator = await broker.bus("operator")
        await operator.nc.publish(subjects.command("prod", "eligibility", "workspace-put"), data)

        async def journalled() -> bool:
            admin = await broker.bus()
            found = await admin.read(
                subjects.workspace_stream("prod"), [subjects.journal("prod", "eligibility", "refused")]
            )
            entries = [msgspec.json.decode(s.data, type=JournalEntry) for s in found]
            return [e.refusal.code for e in entries if e.refusal] == [Code.SIGNATURE_UNKNOWN_KEY]

        assert await eventually(journalled)
        _, out, _ = await loopback("workspace", "list", "--json")
        assert json.loads(out)[0]["environment"] == "staging"
