"""Ten thousand inputs for every parser of outside bytes in every run, counted in the summary; and the judge itself, judged."""

from __future__ import annotations

import time

import pytest

from loopback.contracts.codes import Code, Refused

from . import engine, targets
from .conftest import FOUND
from .engine import Target, attempt

EXECUTIONS = 10_000
SEED = 20261125


@pytest.mark.parametrize("name", targets.names())
def test_no_input_makes_a_parser_crash_hang_or_swell(name: str, request: pytest.FixtureRequest) -> None:
    outcome = engine.run(targets.make(name), EXECUTIONS, SEED)
    request.config.stash[FOUND].append(outcome)
    assert outcome.executions >= EXECUTIONS
    assert not outcome.crashes, "\n".join(
        f"{c.what} at {c.where}: bytes.fromhex({c.data.hex()!r})" for c in outcome.crashes
    )
    assert outcome.outcomes > 1 or outcome.taken == EXECUTIONS, (
        "every input met the same end: the parser is not reached"
    )


@pytest.mark.parametrize("name", targets.names())
def test_a_good_input_is_taken_so_that_mutations_of_it_get_far(name: str) -> None:
    target = targets.make(name)
    assert any(attempt(target, seed)[0] == "taken" for seed in target.seeds)
    assert all(attempt(target, seed)[1] is None for seed in target.seeds)


def judged(run: object, *allowed: type[BaseException]) -> engine.Outcome:
    made = Target("judged", "bytes", run, (b"seed",), (Refused, *allowed))  # type: ignore[arg-type]
    return engine.run(made, 200, 1)


def test_what_callers_expect_is_no_crash_and_anything_else_is() -> None:
    def refuses(data: bytes) -> None:
        raise Refused(Code.NAME_INVALID, "no")

    def breaks(data: bytes) -> None:
        if data != b"seed":
            raise KeyError(data)

    assert judged(refuses).crashes == ()
    outcome = judged(breaks)
    assert [crash.what.partition(":")[0] for crash in outcome.crashes] == ["KeyError"], "one for each place"
    assert judged(breaks, KeyError).crashes == ()
    with pytest.raises(KeyError):
        breaks(outcome.crashes[0].data)


def test_a_run_without_end_and_one_that_swells_are_crashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "MAX_RUN_S", 0.05)

    def hangs(data: bytes) -> None:
        until = time.monotonic() + 20
        while time.monotonic() < until:
            try:
                time.sleep(0.01)
            except Exception:  # as a careless handler would
                continue

    made = Target("hangs", "bytes", hangs, (b"seed",), ())
    (crash,) = engine.run(made, 1, 1).crashes
    assert "no end" in crash.what
    monkeypatch.setattr(engine, "MAX_GROWTH", 1024 * 1024)
    kept: list[bytearray] = []
    outcome = judged(lambda data: kept.append(bytearray(b"x" * 1024 * 1024)))
    assert [crash.where for crash in outcome.crashes] == ["memory"]


def test_a_seed_makes_the_same_inputs_again() -> None:
    def inputs(seed: int) -> list[bytes]:
        found: list[bytes] = []
        for family, data in (
            ("json", b'{"a": [1, {"b": "c"}]}'),
            ("text", b"a = 1\nb = 2\n"),
            ("tar", archive),
        ):
            engine.run(Target(family, family, found.append, (data,), ()), 50, seed)
        return found

    archive = targets.make("archive").seeds[0]
    assert inputs(1) == inputs(1) != inputs(2)


#: Inputs that once crashed a parser. Each is refused now.
MENDED = {
    "credentials: a JWT whose claims are not UTF-8": (
        "credentials",
        targets.CREDENTIALS.replace(b"eyJuYW1l", b"eyKpYW1l"),
    ),
    "credentials: a JWT that is not ASCII": (
        "credentials",
        targets.CREDENTIALS.replace(b"eyJuYW1l", "eyJuYW1é".encode()),
    ),
    "spawner: a request whose text is not UTF-8, which ended the process that has the host's capabilities": (
        "spawner-request",
        b'{"type": "\xff"}',
    ),
}


@pytest.mark.parametrize("story", MENDED)
def test_what_once_crashed_is_refused(story: str) -> None:
    name, data = MENDED[story]
    signed, crash = attempt(targets.make(name), data)
    assert crash is None
    assert signed != "taken"
