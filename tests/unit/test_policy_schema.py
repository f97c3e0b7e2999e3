"""The published JSON Schema is what the parser's tables say, and takes what the parser takes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml
from hypothesis import given, settings
from strategies_firewall import plain_policies
from test_policy_parse import FIRST_FORM, MISTAKES

from loopback.modules.firewall import policy, schema

#: What only the parser says: which fields go together, which names are known, what an address is in detail.
BEYOND_THE_SCHEMA = re.compile(
    r"the name of rules|bits set beyond|bits|is no address|no set '|different address families|IPv4's|need a protocol"
    r"|has no ports|empty range|0 to 65535|'22' is no port|must name one|no type of icmp|255 is no ICMP code|'10' is no rate"
    r"|later rules|do not nest|not available yet|own max|own 'within'|from one packet"
)


def accepts(node: Any, value: Any, root: Any) -> bool:
    """As much of JSON Schema as ours uses; a keyword that is not known here fails."""
    for keyword, wanted in node.items():
        ok: bool
        match keyword:
            case "$schema" | "title" | "description" | "$defs":
                ok = True
            case "$ref":
                ok = accepts(root["$defs"][wanted.removeprefix("#/$defs/")], value, root)
            case "anyOf":
                ok = any(accepts(each, value, root) for each in wanted)
            case "enum":
                ok = value in wanted
            case "const":
                ok = value == wanted and type(value) is type(wanted)
            case "type":
                kinds = {
                    "object": dict, "array": list, "string": str, "null": type(None), "integer": int, "number": int | float,
                }  # fmt: skip
                ok = isinstance(value, kinds[wanted]) and not isinstance(value, bool)
            case "pattern":
                ok = not isinstance(value, str) or re.search(wanted, value) is not None
            case "minimum":
                ok = not isinstance(value, int | float) or value >= wanted
            case "exclusiveMinimum":
                ok = not isinstance(value, int | float) or value > wanted
            case "maximum":
                ok = not isinstance(value, int | float) or value <= wanted
            case "items":
                ok = not isinstance(value, list) or all(accepts(wanted, item, root) for item in value)
            case "minItems":
                ok = not isinstance(value, list) or len(value) >= wanted
            case "maxItems":
                ok = not isinstance(value, list) or len(value) <= wanted
            case "minProperties":
                ok = not isinstance(value, dict) or len(value) >= wanted
            case "maxProperties":
                ok = not isinstance(value, dict) or len(value) <= wanted
            case "required":
                ok = not isinstance(value, dict) or all(key in value for key in wanted)
            case "properties":
                ok = not isinstance(value, dict) or all(
                    accepts(inner, value[key], root) for key, inner in wanted.items() if key in value
                )
            case "propertyNames":
                ok = not isinstance(value, dict) or all(accepts(wanted, key, root) for key in value)
            case "additionalProperties":
                extra = (
                    [key for key in value if key not in node.get("properties", {})]
                    if isinstance(value, dict)
                    else []
                )
                ok = not extra if wanted is False else all(accepts(wanted, value[key], root) for key in extra)
            case "oneOf":
                ok = sum(accepts(one, value, root) for one in wanted) == 1
            case _:
                raise AssertionError(f"the schema uses {keyword!r}, which this test does not know")
        if not ok:
            return False
    return True


def test_the_published_file_is_what_the_code_says() -> None:
    assert schema.FILE.read_text() == schema.text(), "run: python -m loopback.modules.firewall.schema"


def test_the_schema_takes_the_first_form_of_the_language() -> None:
    assert accepts(schema.document(), yaml.safe_load(FIRST_FORM), schema.document())


@given(plain_policies())
@settings(max_examples=60, deadline=None)
def test_the_schema_takes_what_the_parser_takes(plain: dict[str, Any]) -> None:
    policy.parse(json.dumps(plain).encode())
    assert accepts(schema.document(), plain, schema.document())


def test_the_schema_refuses_what_the_parser_refuses_in_form() -> None:
    root = schema.document()
    missed = [f"{field}: {message}" for plain, field, message, _ in MISTAKES if accepts(root, plain, root)]
    assert [text for text in missed if not BEYOND_THE_SCHEMA.search(text)] == []


def test_every_field_of_the_language_is_in_its_document() -> None:
    text = (Path(__file__).parents[2] / "docs" / "policy.md").read_text()
    for table in ("", "default", "rule", "limit", "log", "packet", "test"):
        node = schema.document()["$defs"][table] if table else schema.document()
        for field in node["properties"]:
            assert f"`{field}`" in text, f"docs/policy.md does not mention {table} {field}"
