"""Bad policies: each is refused before anything is staged, and the place and the field are named."""

from __future__ import annotations

import pytest

from loopback.contracts.codes import Code
from loopback.modules.firewall import policy
from loopback.modules.firewall.policy_tables import MAX_SET
from loopback.modules.firewall.policy_text import PolicyRefused

HEAD = '{"version": 1,\n"default": {"ingress": "drop", "egress": "drop"},\n'
BAD = [
    ('"rulez": []}', 3, "rulez", "unknown field"),
    ('"rules": [\n{"name": "a", "action": "drop", "form": "10.0.0.0/8"}]}', 4, "rules[0].form", "unknown field"),
    ('"rules": [{"name": "a", "action": "drop"},\n{"name": "a", "action": "accept"}]}', 4, "rules[1].name",
     "is the name of rules[0]"),
    ('"sets": {"a": [],\n"a": []}}', 4, "", "is there twice"),
    ('"rules": [{"name": "a", "action": "drop", "proto": "tcp",\n"ports": "90-80"}]}', 4, "rules[0].ports", "empty range"),
    ('"rules": [{"name": "a", "action": "drop",\n"from": []}]}', 4, "rules[0].from", "an empty list matches nothing"),
    ('"sets": {"a": ["10.0.0.0/8",\n"10.0.0.1/8"]}}', 4, "sets.a[1]", "bits set beyond its length"),
]  # fmt: skip


@pytest.mark.parametrize(("rest", "line", "field", "said"), BAD)
def test_a_bad_policy_names_line_and_field(rest: str, line: int, field: str, said: str) -> None:
    with pytest.raises(PolicyRefused) as caught:
        policy.parse((HEAD + rest).encode(), "p.json")
    (problem,) = caught.value.problems
    assert (problem.line, problem.field) == (line, field)
    assert said in problem.message


YAML = "version: 1\ndefault: {ingress: drop, egress: accept}\n"
MALFORMED = {
    "deep lists": (HEAD + '"rules": ' + "[" * 100_000, "p.json", 3, "nested more than 16 deep"),
    "deep lists that end": (HEAD + '"rules":\n' + "[" * 20 + "]" * 20 + "}", "p.json", 4, "nested more than 16 deep"),
    "deep objects": (HEAD + '"rules": ' + '{"[": ' * 50_000, "p.json", 3, "nested more than 16 deep"),
    "not a number": (HEAD + '"sets": {"NaN": []},\n"rules": [NaN]}', "p.json", 4, "NaN is not a number"),
    "infinity": (HEAD + '"rules": [{"name": "a", "ports": -Infinity}]}', "p.json", 3, "-Infinity is not a number"),
    "endless number": (HEAD + '"rules": [' + "9" * 5000 + "]}", "p.json", 3, "more digits"),
    "NUL in JSON": (HEAD + '"rules": [{"name": "a\0b"}]}', "p.json", 3, "control character"),
    "NUL in YAML": (YAML + 'rules:\n  - {name: "a\0b", action: accept}\n', "p.yaml", 4, "control characters"),
    "escape in YAML": (YAML + "rules: [] # \x1b[2J\n", "p.yaml", 3, "control characters"),
    "tag": (YAML + "rules: !!python/object/apply:os.system [id]\n", "p.yaml", 3, "the tag"),
    "aliases": (YAML + "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{letter}: &{letter} [{', '.join([f'*{before}'] * 10)}]\n"
        for before, letter in zip("abcdefgh", "bcdefghi", strict=True)
     ), "p.yaml", 9, "more than 4000000 values"),
    "alias of itself": (YAML + "rules: &a [*a]\n", "p.yaml", 3, ""),
    "deep blocks": (YAML + "rules:\n" + "\n".join(" " * n + "-" for n in range(2, 3000)), "p.yaml", 19, "nested more than"),
    "two documents": (YAML + "---\n" + YAML, "p.yaml", 3, "a second document"),
    "a key twice": (YAML + "default: {ingress: accept, egress: accept}\n", "p.yaml", 3, "is there twice"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "name", "line", "said"), MALFORMED.values(), ids=MALFORMED.keys())
def test_a_text_that_abuses_its_language_is_refused_at_its_line(
    text: str, name: str, line: int, said: str
) -> None:
    with pytest.raises(PolicyRefused) as caught:
        policy.parse(text.encode(), name)
    assert caught.value.code == Code.POLICY_MALFORMED
    (problem,) = caught.value.problems
    assert problem.line == line and problem.column > 0
    assert said in problem.message
    assert str(problem).isprintable()


def test_a_set_over_its_limit_is_refused_by_line_and_name_and_one_at_its_limit_is_read() -> None:
    listed = ",".join(f'"{n >> 16 & 255}.{n >> 8 & 255}.{n & 255}.0/24"' for n in range(MAX_SET))
    found = policy.parse(f'{HEAD}"sets": {{"big": [{listed}]}}}}'.encode())
    assert len(found.sets["big"]) == MAX_SET
    with pytest.raises(PolicyRefused) as caught:
        policy.parse(f'{HEAD}"sets": {{"big": [{listed},"255.0.0.0/8"]}}}}'.encode())
    assert caught.value.code == Code.POLICY_INVALID
    (problem,) = caught.value.problems
    assert (problem.line, problem.field) == (3, "sets.big")
    assert problem.message == "1000001 values are more than the 1000000 allowed"
