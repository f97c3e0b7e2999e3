"""From the text of a policy to plain values, with the place of every value at hand when somebody must be told.

JSON is decoded by the standard library at C speed, and only a mistake costs a second, slower pass that finds lines and
columns. YAML needs PyYAML, which is imported only for text that is not JSON: a host is sent JSON and needs no YAML library.
Repeated keys are refused in both, because two readers of one signed text must never see two policies.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import msgspec

from loopback.contracts.codes import Code, Refused

MAX_TEXT: Final = 32 * 1024 * 1024  # bytes; as much as one frame of the module ABI carries
MAX_DEPTH: Final = 16  # the language itself nests five deep
MAX_PROBLEMS: Final = 10  # told at once; more help nobody
MAX_QUOTED: Final = 60  # characters of somebody's value repeated in a message
_MAX_LINED: Final = 1024 * 1024  # characters; items of a longer JSON text do not know their lines

POLICY_HINT: Final = (
    "a policy is YAML or JSON that starts with 'version: 1'; docs/policy.md shows a whole one"
)
PACKET_HINT: Final = (
    'a packet is JSON, e.g. {"src": "203.0.113.9", "dst": "10.1.0.5", "proto": "tcp", "dport": 22}'
)

Path = tuple[str | int, ...]


class Place(NamedTuple):
    """A position in the text; both count from 1."""

    line: int
    column: int


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is wrong with a policy, where, and what would be right. `excerpt` is the line of the text."""

    source: str
    line: int
    column: int
    field: str
    message: str
    hint: str = ""
    excerpt: str = ""

    def __str__(self) -> str:
        where = f"{self.source}:{self.line}:{self.column}: " if self.line else f"{self.source}: "
        return where + (f"{self.field}: " if self.field else "") + self.message


class PolicyRefused(Refused):
    """A policy that was refused, with everything found wrong in it: at least one problem, at most MAX_PROBLEMS."""

    def __init__(self, code: Code, problems: tuple[Problem, ...]) -> None:
        super().__init__(code, "\n".join(map(str, problems)), problems[0].hint)
        self.problems = problems


class Mark(NamedTuple):
    """What to look for in the text: a value by its path, or (`key`) the key under which it stands."""

    path: Path
    key: bool = False


class Source:
    """The text of one policy, or (`packet`) of one packet. `plain` is its content as JSON-able values."""

    def __init__(self, data: bytes, name: str, *, packet: bool = False) -> None:
        """Decode. Raises PolicyRefused(POLICY_MALFORMED) where the text is neither JSON nor YAML, or abuses either.

        A packet is JSON alone: programs write such lines, and one that reads only as YAML is a mistake of theirs.
        """
        self.name = name
        self._only_json = packet or name.endswith(".json")
        self._hint = PACKET_HINT if packet else POLICY_HINT
        self.yaml = False
        self._lines: dict[Path, int] = {}
        if len(data) > MAX_TEXT:
            self.text = ""
            raise self.malformed(None, f"{len(data)} bytes are more than the {MAX_TEXT} allowed")
        try:
            self.text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            self.text = data[: error.start].decode("utf-8-sig", "replace")
            place = place_of(self.text, len(self.text))
            raise self.malformed(place, f"byte {data[error.start]:#04x} is not UTF-8") from None
        self.plain = self._decode()

    def _decode(self) -> Any:
        if not self.text.strip():
            raise self.malformed(None, "there is nothing in it")
        if self._only_json or self.text.lstrip().startswith(("{", "[")):
            try:
                return read_json(self.text)
            except json.JSONDecodeError as error:
                try:
                    if self._only_json:
                        raise ImportError  # JSON was asked for: YAML that happens to read is not what was meant
                    return self._read_yaml()
                except (ImportError, Refused):
                    place = Place(error.lineno, error.colno)
                    raise self.malformed(place, f"not JSON: {error.msg}") from None
            except _RepeatedKey:
                found = next(iter(repeated(self.text)), None)
                if found is None:  # it stands behind something that is nested deeper than anybody looks
                    raise self.malformed(_too_deep(self.text), f"nested more than {MAX_DEPTH} deep") from None
                mark, key = found
                raise self.malformed(
                    mark, f"the key {quote(key)} is there twice", "keep one of them"
                ) from None
            except (RecursionError, _TooDeep):
                raise self.malformed(_too_deep(self.text), f"nested more than {MAX_DEPTH} deep") from None
            except ValueError as error:  # NaN, or an integer of thousands of digits
                numbers = (one for one in _TOKEN.finditer(self.text) if one["number"])
                at = next((place_of(self.text, one.start()) for one in numbers), None)
                long = "a number of more digits than anybody needs"
                said = str(error) if "is not a number" in str(error) else long
                raise self.malformed(at, f"not JSON: {said}") from None
        try:
            return self._read_yaml()
        except ImportError:
            raise self.malformed(
                Place(1, 1),
                "not JSON, and there is no YAML reader here",
                "install PyYAML, or give the policy as JSON",
            ) from None

    def _read_yaml(self) -> Any:
        from loopback.modules.firewall import policy_yaml

        try:
            plain, self._lines = policy_yaml.read(self.text)
        except policy_yaml.Malformed as error:
            raise self.malformed(error.place, error.message, error.hint) from None
        self.yaml = True
        return plain

    def places(self, wanted: set[Mark]) -> dict[Mark, Place]:
        """Where these are in the text; what is not there is not in the answer. Costs a pass over the text."""
        found: dict[Mark, Place] = {}
        for mark, place in self._marks():
            if mark in wanted and mark not in found:
                found[mark] = place
                if len(found) == len(wanted):
                    break
        return found

    def item_lines(self) -> dict[Path, int]:
        """Line of each item of the lists at the top (rules, tests): all of them in YAML, in JSON where it is cheap."""
        if not self.yaml and "\n" in self.text.strip() and len(self.text) <= _MAX_LINED:
            return {
                mark.path: place.line for mark, place in self._marks() if len(mark.path) == 2 and not mark.key
            }
        return self._lines

    def _marks(self) -> Iterator[tuple[Mark, Place]]:
        if self.yaml:
            from loopback.modules.firewall import policy_yaml

            return policy_yaml.marks(self.text)
        return json_marks(self.text)

    def problem(self, place: Place | None, field: str, message: str, hint: str = "") -> Problem:
        """One problem at a place (None: somewhere in the text)."""
        line, column = place or (0, 0)
        excerpt = ""
        if place is not None:
            lines = self.text.split("\n", line)
            excerpt = lines[line - 1].rstrip("\r") if line <= len(lines) else ""
        return Problem(
            source=self.name,
            line=line,
            column=column,
            field=field,
            message=message,
            hint=hint,
            excerpt=excerpt,
        )

    def malformed(self, place: Place | None, message: str, hint: str = "") -> PolicyRefused:
        """The refusal of a text that cannot be read at all."""
        return PolicyRefused(Code.POLICY_MALFORMED, (self.problem(place, "", message, hint or self._hint),))


def quote(value: Any) -> str:
    """A value as a message repeats it: in full while it is short, never raw control characters."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "a mapping"
    text = repr(value)
    return text if len(text) <= MAX_QUOTED else text[: MAX_QUOTED - 1] + "…"


_PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")


def dotted(path: Path) -> str:
    """A path as people write it: `rules[2].limit.rate`."""
    written = ""
    for step in path:
        if isinstance(step, int):
            written += f"[{step}]"
        elif _PLAIN_KEY.fullmatch(step):
            written += f".{step}" if written else step
        else:
            written += f"[{quote(step)}]"
    return written


def place_of(text: str, offset: int) -> Place:
    """Line and column of an offset into the text."""
    return Place(text.count("\n", 0, offset) + 1, offset - text.rfind("\n", 0, offset))


class _RepeatedKey(ValueError):
    pass


class _TooDeep(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _RepeatedKey
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def read_json(text: str) -> Any:
    """Decode JSON. Raises json.JSONDecodeError, RecursionError or ValueError; see `Source` for who explains them."""
    plain = _DECODER.decode(text)
    if _depth_over(plain, MAX_DEPTH):
        raise _TooDeep
    return plain


def _depth_over(plain: Any, allowed: int) -> bool:
    """Whether the nesting is deeper than allowed; plain loops over rules stay cheap, strings are not visited."""
    level = [plain] if isinstance(plain, dict | list) else []
    for _ in range(allowed):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


_STRINGS = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")
_SCALAR = re.compile(r"[^,\]}\s]+")
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[][{}]|(?P<number>-?(?:NaN|Infinity|[0-9]{4301}))', re.DOTALL)


def json_marks(text: str) -> Iterator[tuple[Mark, Place]]:
    """Every key and value of a JSON text that is known to be well formed, in order, with its place."""
    line, start, counted = 1, 0, 0  # the line of offset `counted`, and where that line begins
    for mark, offset, _ in _walk(text):
        line += text.count("\n", counted, offset)
        start = max(start, text.rfind("\n", counted, offset) + 1)
        counted = offset
        yield mark, Place(line, offset - start + 1)


def _too_deep(text: str) -> Place | None:
    """Where a JSON text is nested too deep for the first time."""
    depth = 0
    for one in _TOKEN.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(one[0], 0)
        if depth > MAX_DEPTH:
            return place_of(text, one.start())
    return None


def repeated(text: str) -> Iterator[tuple[Place, str]]:
    """The keys that are there twice in one object."""
    seen: set[Mark] = set()
    for mark, offset, depth in _walk(text):
        if mark.key:
            if mark in seen:
                yield place_of(text, offset), str(mark.path[-1])
            seen.add(mark)
        if depth > MAX_DEPTH:
            return


def _walk(text: str) -> Iterator[tuple[Mark, int, int]]:
    """Marks with their offsets and depth, without recursion."""
    path: list[str | int] = []
    at = _skip(text, 0)
    while True:
        # at a value
        yield Mark(tuple(path)), at, len(path)
        first = text[at]
        if first == "{" or first == "[":
            at = _skip(text, at + 1)
            if text[at] not in "}]":
                if first == "[":
                    path.append(0)
                else:
                    key, after = _STRINGS.raw_decode(text, at)
                    path.append(key)
                    yield Mark(tuple(path), key=True), at, len(path)
                    at = _skip(text, _skip(text, after) + 1)
                continue
            at += 1
        elif first == '"':
            _, at = _STRINGS.raw_decode(text, at)
        else:
            found = _SCALAR.match(text, at)
            assert found is not None
            at = found.end()
        # behind a value: leave what ends here, go on with what follows
        while True:
            if not path:
                return
            at = _skip(text, at)
            if text[at] == ",":
                at = _skip(text, at + 1)
                step = path.pop()
                if isinstance(step, int):
                    path.append(step + 1)
                else:
                    key, after = _STRINGS.raw_decode(text, at)
                    path.append(key)
                    yield Mark(tuple(path), key=True), at, len(path)
                    at = _skip(text, _skip(text, after) + 1)
                break
            path.pop()
            at += 1


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def render(problems: tuple[Problem, ...], code: Code) -> str:
    """Problems as a compiler tells them: the place, the line with a caret below it, and what would be right."""
    written: list[str] = []
    for problem in problems:
        written.append(f"{problem}  [{code}]")
        if problem.line and problem.excerpt.strip():
            start = max(0, problem.column - 100)  # of a long line, what stands around the place
            shown = problem.excerpt[start : start + 120]
            number = str(problem.line)
            written.append(f"  {number} | {_printable(shown)}")
            written.append(f"  {' ' * len(number)} | {' ' * (problem.column - 1 - start)}^")
        if problem.hint:
            written.append(f"  {problem.hint}")
    return "\n".join(written)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)
