"""What trust costs: verifying a command, verifying a desired state, and a cold TUF refresh beside python-tuf's own.

The desired state is one of a regulated workspace: signed by activation, with the host's record, the start and a second
operator's approval inside, two hundred operators in the trust document. Every document is seen for the first time; the
repository is in memory on both sides and the disk is a real one.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
from report import Figure, figure, in_turn, ratios, table, write
from tuf.api import exceptions
from tuf.ngclient import FetcherInterface, Updater

from loopback.contracts import desired, envelope, trustdoc
from loopback.contracts.envelope import Envelope
from loopback.contracts.keys import SigningKey
from loopback.contracts.messages import (
    Command,
    HostPut,
    RolloutApprove,
    RolloutStart,
    Scope,
    Selector,
    Wave,
    decode_command,
)
from loopback.contracts.trustdoc import Operator, Role, Trust, TrustDocument, WorkspaceRules
from loopback.host.decide import check_desired
from loopback.host.scope import Answer, Identity
from loopback.host.state import HostState, ModuleState
from loopback.trust import signing, updater
from loopback.trust.repository import TrustedRepository, target_path

NOW = datetime.now(UTC)
OPERATORS = 200
RELEASES = 50
SERVICE = "prod"
VERIFY_MS = 0.5  # goal: a command or desired state
COLD_RATIO = 3.0  # goal: a cold refresh ÷ python-tuf's own

Running = desired.Running
OLD = Running(version="1.0.0", package="a" * 64, policy="b" * 64, policy_serial=1)
NEW = Running(version="1.1.0", package="c" * 64, policy="d" * 64, policy_serial=2)


class People:
    """Who signs, and who they are to a host."""

    def __init__(self) -> None:
        self.releaser, self.approver, self.activation, self.host = (SigningKey.generate() for _ in range(4))
        others = (
            Operator(f"o{n}", SigningKey.generate().public.text, {"test": (Role.VIEWER,)})
            for n in range(OPERATORS - 2)
        )
        self.document = TrustDocument(
            version=7,
            operators=(
                Operator("ada", self.releaser.public.text, {SERVICE: (Role.RELEASER, Role.ADMIN)}),
                Operator("eve", self.approver.public.text, {SERVICE: (Role.APPROVER,)}),
                *others,
            ),
            services={"activation": (self.activation.public.text,)},
            workspaces={SERVICE: WorkspaceRules(regulated=True)},
        )
        self.trust = Trust(self.document)
        self._numbers = itertools.count()

    def fields(self) -> dict[str, object]:
        return {
            "id": f"c{next(self._numbers)}", "workspace": SERVICE, "issued_at": NOW,
            "expires_at": NOW + timedelta(hours=1),
        }  # fmt: skip

    def command(self, command: Command, key: SigningKey) -> Envelope:
        return envelope.seal(envelope.COMMAND, msgspec.json.encode(command), key)

    def start(self) -> Envelope:
        scope = Scope(
            workspace=SERVICE, module="firewall", packages={NEW.version: NEW.package}, policy=NEW.policy,
            policy_serial=NEW.policy_serial, selector=Selector(labels={"role": "web"}),
            not_before=NOW - timedelta(minutes=1), not_after=NOW + timedelta(days=1),
        )  # fmt: skip
        waves = (
            Wave(name="canary", count=1, soak_s=600),
            Wave(name="quarter", percent=25),
            Wave(name="rest", percent=100),
        )
        return self.command(
            RolloutStart(
                **self.fields(), rollout="web-2026-11", module="firewall", version=NEW.version, waves=waves, scope=scope
            ),
            self.releaser,
        )  # fmt: skip

    def desired(self) -> Envelope:
        """A document that nobody saw before, with a record, a start and an approval that nobody saw before."""
        start = self.start()
        digest = hashlib.sha256(envelope.payload_of(start)).hexdigest()
        approval = self.command(
            RolloutApprove(**self.fields(), rollout="web-2026-11", start=digest), self.approver
        )
        record = self.command(
            HostPut(
                **self.fields(), host="web-1.example", public_key=self.host.public.text,
                labels={"role": "web", "site": "north"}, addresses=("10.0.0.7", "2001:db8::7"),
            ),
            self.releaser,
        )  # fmt: skip
        entry = desired.DesiredModule(
            module="firewall", running=NEW, generation=5, rollout="web-2026-11", scope=start, trial_s=10.0,
            expected=OLD, approvals=(approval,),
        )  # fmt: skip
        document = desired.DesiredState(
            host="web-1.example",
            workspace=SERVICE,
            generation=5,
            modules=(entry,),
            issued_at=NOW,
            record=record,
        )
        return envelope.seal(envelope.DESIRED, msgspec.json.encode(document), self.activation)


def verifying(rounds: int, each: int) -> dict[str, Figure]:
    """Commands and desired states, beside bare Ed25519 verification."""
    people = People()
    many = rounds * each
    commands = [msgspec.json.encode(people.start()) for _ in range(many)]
    states = [msgspec.json.encode(people.desired()) for _ in range(many)]
    identity = Identity(
        host="web-1.example", workspace=SERVICE, key=people.host.public, modules=("firewall",)
    )
    own = ModuleState(
        module="firewall", generation=4, rollout="r0", target=OLD, promoted=OLD, serial_floor=1, floor_policy=OLD.policy
    )  # fmt: skip
    before = HostState(incarnation="i1", generation=4)
    message = commands[0]
    signature = people.releaser.sign(message)

    def command(number: int) -> None:
        payload, signers = envelope.open_envelope(
            envelope.parse(commands[number]), envelope.COMMAND, people.trust.operator_keys
        )
        people.trust.authorise(signers, Role.RELEASER, decode_command(payload).workspace)

    def state(number: int) -> None:
        found = check_desired(
            envelope.parse(states[number]), identity, before, {"firewall": own}, people.trust, NOW
        )
        (entry,) = found.entries
        if entry.answer is not Answer.CHANGE:
            raise AssertionError(entry)

    def again(_: int) -> None:
        state(0)

    def bare(_: int) -> None:
        if not people.releaser.public.verifies(signature, message):
            raise AssertionError("the bare signature does not hold")

    for warm in (command, again, bare):
        warm(0)
    times = in_turn({"command": command, "state": state, "bare": bare, "again": again}, rounds, each)
    share = figure(times["bare"], "ms").value
    return {
        "command_ms": figure(
            times["command"], "ms", VERIFY_MS, f"one signature is {share / figure(times['command'], '').value:.0%} of it"
        ),
        "desired_ms": figure(
            times["state"], "ms", VERIFY_MS, f"four signatures are {4 * share / figure(times['state'], '').value:.0%} of it"
        ),
        "desired_again_ms": figure(times["again"], "ms", VERIFY_MS, "the inner signatures are remembered"),
        "signature_ms": figure(times["bare"], "ms", None, "one bare Ed25519 verification"),
    }  # fmt: skip


def repository() -> dict[str, bytes]:
    """A repository as delivery publishes it, with one family and its releases."""
    keys = {n: SigningKey.generate() for n in ("root", "targets", "snapshot", "timestamp", "family")}
    root = signing.new_root(NOW, **{n: keys[n] for n in ("root", "targets", "snapshot", "timestamp")})
    document = msgspec.json.encode(People().document)
    targets = signing.new_targets(
        NOW, version=1, files={trustdoc.TARGET: signing.target(trustdoc.TARGET, document)}
    )
    signing.delegate(targets, "firewall", keys["family"])
    paths = [target_path("firewall", f"1.{n}.0") for n in range(RELEASES)]
    releases = signing.new_targets(
        NOW, version=1, files={p: signing.release(p, f"{n:064x}", 500_000, f"1.{n}.0", "stable") for n, p in enumerate(paths)}
    )  # fmt: skip
    signed = {
        "targets": signing.sign(targets, keys["targets"]),
        "module-firewall": signing.sign(releases, keys["family"]),
    }
    snapshot = signing.sign(signing.new_snapshot(NOW, version=1, files=signed), keys["snapshot"])
    return {
        "1.root.json": signing.sign(root, keys["root"]),
        "1.targets.json": signed["targets"],
        "1.module-firewall.json": signed["module-firewall"],
        "1.snapshot.json": snapshot,
        "timestamp.json": signing.sign(
            signing.new_timestamp(NOW, version=1, snapshot=snapshot), keys["timestamp"]
        ),
    }


class MemoryFetcher(FetcherInterface):
    """python-tuf's own client on the same files."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self._files = files

    def _fetch(self, url: str) -> Iterator[bytes]:
        data = self._files.get(url.rpartition("/")[2])
        if data is None:
            raise exceptions.DownloadHTTPError("no", 404)
        return iter((data,))


def refreshing(rounds: int, each: int, place: Path) -> dict[str, Figure]:
    """A first refresh in an empty folder, ours and python-tuf's own; and how much of ours is flushing."""
    files = repository()
    count = itertools.count()
    flushed: list[float] = []

    def folder() -> Path:
        found = place / str(next(count))
        found.mkdir()
        return found

    fresh: dict[str, list[Path]] = {"ours": [], "bare": []}
    for _ in range(rounds * each):
        fresh["bare"].append(folder())
        fresh["ours"].append(folder())
        TrustedRepository.pin(fresh["ours"][-1], files["1.root.json"])

    def ours(number: int) -> None:
        with flushes() as spent:
            TrustedRepository(fresh["ours"][number], files.get, now=lambda: NOW).refresh()
        flushed.append(sum(spent))

    def bare(number: int) -> None:
        Updater(
            str(fresh["bare"][number]), "memory:///", fetcher=MemoryFetcher(files), bootstrap=files["1.root.json"]
        ).refresh()  # fmt: skip

    times = in_turn({"ours": ours, "bare": bare}, rounds, each)
    flushing = figure([sorted(flushed)[len(flushed) // 2]], "ms", None, "of ours spent waiting for the disk")
    ratio = figure(ratios(times["ours"], times["bare"]), "×", COLD_RATIO)
    share = flushing.value / figure(times["ours"], "").value
    return {
        "tuf_cold_ratio": ratio._replace(
            words=f"waiting for the disk is {share:.0%} of ours; python-tuf does not flush"
        ),
        "tuf_cold_ms": figure(times["ours"], "ms", None, "TrustedRepository.refresh in an empty folder"),
        "tuf_bare_ms": figure(times["bare"], "ms", None, "tuf.ngclient.Updater on the same files"),
        "tuf_flush_ms": flushing,
    }


@contextmanager
def flushes() -> Iterator[list[float]]:
    """How long each wait for the disk inside took, in ms."""
    honest, spent = updater._flush, []

    def timed(paths: list[Path]) -> None:
        began = time.perf_counter_ns()
        honest(paths)
        spent.append((time.perf_counter_ns() - began) / 1e6)

    updater._flush = timed
    try:
        yield spent
    finally:
        updater._flush = honest


def main(arguments: list[str]) -> int:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="runs of each figure")
    parser.add_argument("--each", type=int, default=40, help="calls in a run")
    parser.add_argument("--out", type=Path, default=Path("build/bench/trust.json"))
    options = parser.parse_args(arguments)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="trust-", dir=options.out.parent))
    try:
        figures = verifying(options.rounds, options.each)
        figures |= refreshing(options.rounds, max(1, options.each // 4), place)
    finally:
        shutil.rmtree(place)
    write(options.out, figures)
    print(table("trust", figures))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
