"""A rollout as people write it, in YAML: read, checked, and turned into the command's parts.

Durations are `10m` or `1h30m` (or plain seconds), shares `2%` (or a number from 0 to 1). Every mistake is told as
`file:line: field: what is wrong`.
"""

from __future__ import annotations

import math
import re
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, Literal, NoReturn

import msgspec
import yaml

from loopback.contracts.codes import Code, Refused
from loopback.contracts.messages import Gates, Selector, Wave

MAX_FILE: Final = 1024 * 1024  # bytes
MAX_DURATION_S: Final = 10 * 365 * 86400.0
VALID_S: Final = (
    86400.0  # how long hosts may be changed on the strength of one signature, where the file does not say
)
_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION: Final = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|s|m|h|d))+")
_PART: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")


class RolloutFile(msgspec.Struct, frozen=True, kw_only=True):
    """What a rollout file says. `policy` is a path, resolved against the file's folder; None where it names none."""

    source: Path
    rollout: str
    workspace: str
    module: str
    version: str
    policy: Path | None
    waves: tuple[Wave, ...]
    selector: Selector
    gates: Gates
    max_unavailable: float
    host_deadline_s: float
    trial_s: float
    on_failure: Literal["rollback", "halt"]
    valid: timedelta
    absent: bool
    lines: dict[str, int]

    def place(self, reason: str) -> str:
        """A refusal's reason that begins with a field, with the file and line of that field in front."""
        field = reason.partition(":")[0].removeprefix("scope.")
        while field:
            if field in self.lines:
                return f"{self.source}:{self.lines[field]}: {reason}"
            field = field.rpartition(".")[0] if "." in field else field.rpartition("[")[0]
        return f"{self.source}: {reason}"


class _Reader:
    """Reads one mapping of the file, field by field."""

    def __init__(self, source: Path, path: str, node: yaml.Node, lines: dict[str, int]) -> None:
        self.source, self.path, self.lines = source, path, lines
        if not isinstance(node, yaml.MappingNode):
            self.wrong("", node, f"it must be a mapping of fields, not {_kind(node)}")
        self.node = node
        self.fields: dict[str, yaml.Node] = {}
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else ""
            if not name:
                self.wrong("", key, "a field's name must be text")
            if name in self.fields:
                self.wrong(name, key, "it is given twice")
            self.fields[name] = value
            lines[self.at(name)] = key.start_mark.line + 1

    def at(self, name: str) -> str:
        """The field's full name."""
        return f"{self.path}.{name}" if self.path and name else self.path or name

    def wrong(self, name: str, node: yaml.Node, problem: str, next_step: str = "") -> NoReturn:
        """Refuse, naming file, line and field."""
        line = node.start_mark.line + 1
        field = f"{self.at(name)}: " if self.at(name) else ""
        raise Refused(
            Code.ROLLOUT_INVALID, f"{self.source}:{line}: {field}{problem}", next_step or "correct the file"
        )

    def only(self, *names: str) -> None:
        """Refuse fields that do not exist."""
        for name, node in self.fields.items():
            if name not in names:
                known = ", ".join(names)
                self.wrong(name, node, "there is no such field", f"the fields here are {known}")

    def text(self, name: str, default: str | None = None) -> str:
        """A text, exactly as it is written: version 1.10 stays 1.10."""
        node = self.fields.get(name)
        if node is None:
            if default is None:
                self.wrong(name, self.node, "it is missing")
            return default
        if not isinstance(node, yaml.ScalarNode) or not node.value.strip():
            self.wrong(name, node, f"it must be text, not {_kind(node)}")
        return str(node.value)

    def number(self, name: str, node: yaml.Node) -> float:
        """A number."""
        try:
            value = float(node.value) if isinstance(node, yaml.ScalarNode) else math.nan
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            self.wrong(name, node, f"{_kind(node)} is not a number")
        return value

    def whole(self, name: str) -> int | None:
        """A whole number."""
        node = self.fields.get(name)
        if node is None:
            return None
        value = self.number(name, node)
        if value != int(value):
            self.wrong(name, node, f"{_kind(node)} is not a whole number")
        return int(value)

    def seconds(self, name: str, default: float) -> float:
        """A duration."""
        node = self.fields.get(name)
        if node is None:
            return default
        said = str(node.value) if isinstance(node, yaml.ScalarNode) else ""
        if _DURATION.fullmatch(said):
            value = sum(float(amount) * _UNITS[unit] for amount, unit in _PART.findall(said))
        else:
            try:
                value = float(said)
            except ValueError:
                value = math.nan
        if not 0 <= value <= MAX_DURATION_S:
            self.wrong(name, node, f"{_kind(node)} is not a duration", "write it like 30s, 10m or 1h30m")
        return value

    def share(self, name: str, default: float) -> float:
        """A share of hosts, from 0 to 1, as a percentage or a fraction."""
        node = self.fields.get(name)
        if node is None:
            return default
        said = str(node.value) if isinstance(node, yaml.ScalarNode) else ""
        try:
            value = float(said.removesuffix("%")) / (100 if said.endswith("%") else 1)
        except ValueError:
            value = math.nan
        if not 0 <= value <= 1:
            self.wrong(name, node, f"{_kind(node)} is not a share of hosts", "write it like 2% or 0.02")
        return value

    def percent(self, name: str) -> float | None:
        """A percentage as the number of percents: `25` and `25%` are the same."""
        node = self.fields.get(name)
        if node is None:
            return None
        said = str(node.value) if isinstance(node, yaml.ScalarNode) else ""
        try:
            value = float(said.removesuffix("%"))
        except ValueError:
            value = math.nan
        if not 0 < value <= 100:
            self.wrong(name, node, f"{_kind(node)} is not a percentage above 0 and up to 100")
        return value

    def choice(self, name: str, default: str, *allowed: str) -> str:
        """One of a few words."""
        found = self.text(name, default)
        if found not in allowed:
            self.wrong(name, self.fields[name], f"{found!r} is neither of {', '.join(allowed)}")
        return found

    def flag(self, name: str) -> bool:
        """true or false."""
        return self.choice(name, "false", "true", "false") == "true"

    def labels(self, name: str) -> dict[str, str]:
        """A mapping of texts."""
        node = self.fields.get(name)
        if node is None:
            return {}
        inner = _Reader(self.source, self.at(name), node, self.lines)
        return {key: inner.text(key) for key in inner.fields}

    def names(self, name: str) -> tuple[str, ...]:
        """A list of texts."""
        node = self.fields.get(name)
        if node is None:
            return ()
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            self.wrong(name, node, f"it must be a list of host names, not {_kind(node)}")
        for item in node.value:
            if not isinstance(item, yaml.ScalarNode) or not item.value.strip():
                self.wrong(name, item, "a host's name must be text")
        return tuple(str(item.value) for item in node.value)

    def inner(self, name: str) -> _Reader | None:
        """A mapping inside."""
        node = self.fields.get(name)
        return _Reader(self.source, self.at(name), node, self.lines) if node is not None else None


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list" if node.value else "an empty list"
    return repr(node.value) if node.value else "empty"


def load(path: Path) -> RolloutFile:
    """Read a rollout file. Raises Refused(ROLLOUT_INVALID) naming file, line and field; OSError where it is not readable."""
    data = path.read_bytes()
    if len(data) > MAX_FILE:
        raise Refused(
            Code.ROLLOUT_INVALID, f"{path}: {len(data)} bytes are more than a rollout file may have"
        )
    return loads(data, path)


def loads(data: bytes, path: Path) -> RolloutFile:
    """The same for bytes; `path` is how messages call them and where a policy's path is looked up."""
    lines: dict[str, int] = {}
    top = _Reader(path, "", _compose(data, path), lines)
    top.only(
        "rollout", "workspace", "module", "version", "policy", "selector", "waves", "gates", "max_unavailable",
        "host_deadline", "trial", "on_failure", "valid", "absent",
    )  # fmt: skip
    absent = top.flag("absent")
    if absent:
        for name in ("version", "policy"):
            if name in top.fields:
                top.wrong(name, top.fields[name], "a rollout that takes the module away has none")
    policy = top.text("policy", "")
    gates, selector = top.inner("gates"), top.inner("selector")
    if gates is not None:
        gates.only("max_failed", "min_sample")
    if selector is not None:
        selector.only("labels", "hosts")
    on_failure = top.choice("on_failure", "rollback", "rollback", "halt")
    return RolloutFile(
        source=path,
        rollout=top.text("rollout"),
        workspace=top.text("workspace"),
        module=top.text("module"),
        version="" if absent else top.text("version"),
        policy=path.parent / policy if policy else None,
        waves=_waves(top),
        selector=Selector(labels=selector.labels("labels"), hosts=selector.names("hosts"))
        if selector is not None
        else Selector(),
        gates=Gates(
            max_failed=gates.share("max_failed", 0.0),
            min_sample=1 if (sample := gates.whole("min_sample")) is None else sample,
        )
        if gates is not None
        else Gates(),
        max_unavailable=top.share("max_unavailable", 1.0),
        host_deadline_s=top.seconds("host_deadline", 300.0),
        trial_s=top.seconds("trial", 10.0),
        on_failure="halt" if on_failure == "halt" else "rollback",
        valid=timedelta(seconds=top.seconds("valid", VALID_S)),
        absent=absent,
        lines=lines,
    )


def _compose(data: bytes, path: Path) -> yaml.Node:
    try:
        node: Any = yaml.compose(data, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = f"{path}:{line}: not YAML: {error.problem}"
        raise Refused(Code.ROLLOUT_INVALID, problem, "correct the file") from None
    except yaml.reader.ReaderError as error:
        problem = f"{path}: no text at byte {error.position}: {error.reason}"
        raise Refused(Code.ROLLOUT_INVALID, problem, "write the file as YAML in UTF-8") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        problem = f"{path}: not YAML: {error}"
        raise Refused(Code.ROLLOUT_INVALID, problem, "correct the file") from None
    if node is None:
        raise Refused(Code.ROLLOUT_INVALID, f"{path}: the file is empty", "see docs/policy.md for an example")
    found: yaml.Node = node
    return found


def _waves(top: _Reader) -> tuple[Wave, ...]:
    node = top.fields.get("waves")
    if node is None:
        top.wrong("waves", top.node, "it is missing", "name at least one wave, the canary")
    if not isinstance(node, yaml.SequenceNode) or not node.value:
        top.wrong("waves", node, f"it must be a list of waves, not {_kind(node)}")
    found = []
    for index, item in enumerate(node.value):
        top.lines[f"waves[{index}]"] = item.start_mark.line + 1
        wave = _Reader(top.source, f"waves[{index}]", item, top.lines)
        wave.only("name", "count", "percent", "hosts", "labels", "soak")
        found.append(
            Wave(
                name=wave.text("name"),
                count=wave.whole("count"),
                percent=wave.percent("percent"),
                hosts=wave.names("hosts"),
                labels=wave.labels("labels"),
                soak_s=wave.seconds("soak", 0.0),
            )
        )
    return tuple(found)
