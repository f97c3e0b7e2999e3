"""`loopback pool` against running services: a load balancer's account speaks for its own pool."""

from __future__ import annotations

import json

import msgspec
import pytest
from support import eventually
from support_cli import Operator, services

from loopback.contracts import subjects
from loopback.contracts.codes import Code
from loopback.contracts.keys import SigningKey
from loopback.contracts.messages import JournalEntry

pytestmark = pytest.mark.broker


async def test_a_pool_is_put_changed_listed_and_removed_and_the_journal_says_who(broker, capsys):
    loopback = Operator(broker, capsys)
    async with services(broker):
        assert (await loopback("workspace", "put", "prod"))[0] == 0
        code, out, err = await loopback("pool", "put", "shop", "10.0.0.7", "2001:db8::7", "--json")
        assert code == 0, err
        assert json.loads(out) == {
            "pool": "shop", "workspace": "prod", "serial": 1, "addresses": ["10.0.0.7", "2001:db8::7"], "absent": False,
        }  # fmt: skip
        code, _, err = await loopback("pool", "put", "shop", "10.0.0.8")
        assert code == 0 and "pool shop has 1 address (serial 2)" in err
        code, out, _ = await loopback("pool", "list")
        assert code == 0 and "shop" in out and "10.0.0.8" in out and "10.0.0.7" not in out

        code, _, err = await loopback("pool", "put", "shop", "10.0.0.9", "--serial", "2")
        assert code == 2 and Code.POOL_SERIAL in err and "serial 3" in err
        code, _, err = await loopback("pool", "put", "shop", "10.0.0.999")
        assert code == 2 and Code.COMMAND_MALFORMED in err and "10.0.0.999" in err
        code, _, err = await loopback("pool", "put", "shop")
        assert code == 2 and "--empty" in err
        code, out, _ = await loopback("pool", "list", "--json")
        assert [p["addresses"] for p in json.loads(out)] == [["10.0.0.8"]], "what was refused changed nothing"

        assert (await loopback("pool", "remove", "shop"))[0] == 0
        assert json.loads((await loopback("pool", "list", "--json"))[1]) == []
        code, _, err = await loopback("pool", "remove", "shop")
        assert code == 2 and "no pool" in err
        code, out, _ = await loopback("pool", "put", "shop", "--empty", "--json")
        assert code == 0 and json.loads(out)["serial"] == 4, "serials go on where the pool of before ended"

        bus = await broker.bus()
        stored = await bus.last("LB_WS_prod", subjects.journal("prod", "eligibility", "accepted"))
        assert stored is not None
        entry = msgspec.json.decode(stored.data, type=JournalEntry)
        assert (entry.command_type, entry.operators, entry.detail["serial"]) == ("pool.put", ("admin",), "4")


async def test_a_balancers_key_moves_its_own_pool_and_no_other(broker, capsys, tmp_path):
    loopback = Operator(broker, capsys)
    key = tmp_path / "lb.pem"
    async with services(broker):
        assert (await loopback("workspace", "put", "prod"))[0] == 0
        account = SigningKey.generate()
        account.save(key)
        public = account.public.text
        balancer = (
            "keys",
            "operator",
            "lb-1",
            "--role",
            "balancer",
            "--workspace",
            "prod",
            "--public-key",
            public,
        )
        code, _, err = await loopback(*balancer)
        assert code == 2 and "--pool" in err, "a balancer of nothing is a mistake"
        code, _, err = await loopback(*balancer, "--pool", "shop")
        assert code == 0, err
        code, out, _ = await loopback("keys", "show")
        assert "pools: shop" in out

        async def believed() -> bool:
            code, _, _ = await loopback("--operator-key", str(key), "pool", "put", "shop", "10.0.0.7")
            return code == 0

        assert await eventually(believed)
        code, _, err = await loopback("--operator-key", str(key), "pool", "put", "blog", "10.0.0.7")
        assert code == 2 and Code.COMMAND_UNAUTHORISED in err and "lb-1" in err
        code, _, err = await loopback("--operator-key", str(key), "workspace", "put", "lab")
        assert code == 2 and Code.COMMAND_UNAUTHORISED in err
