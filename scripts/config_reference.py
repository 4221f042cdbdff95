"""Write docs/config.md from the schemas of the configs, or check that it is up to date.

    python scripts/config_reference.py           # write the file
    python scripts/config_reference.py --check   # exit with 1 if it differs

Every field needs a description and, unless its default is one, an example.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from latentcache.config import Config
from latentcache.config_eval import EvalConfig

TARGET = Path(__file__).parents[1] / "docs" / "config.md"

# Sections that occur in several places; the first place has their table.
_SHARED = ("StorageOptions", "Network")

_HEADER = """\
# Configuration reference

`scripts/config_reference.py` generates this file from the config classes; do not edit it.

A config is a YAML file. `latentcache schema` prints the same information as a JSON Schema, which
editors use for completion. `--set a.b=value` overrides one field on the command line. An unknown
field is an error. URLs may contain `~`, `$NAME` and `${NAME}`; write `$$` for a dollar sign.
Credentials never belong in a config.

"""


def reference() -> str:
    """Return the text of docs/config.md."""
    parts = [_HEADER]
    shared: dict[str, str] = {}
    parts += _file(
        "Config of `latentcache run`, `plan` and the commands for a dataset", Config, shared
    )
    parts += _file("Config of `latentcache eval`", EvalConfig, shared, " of `eval`")
    return "".join(parts).rstrip("\n") + "\n"


def _file(
    title: str, model: type[BaseModel], shared: dict[str, str], suffix: str = ""
) -> Iterator[str]:
    """Yield the tables of a kind of config.

    Args:
        title: the heading.
        model: the class of the config.
        shared: the anchors of the sections of `_SHARED` that have a table already; changed.
        suffix: what the headings of sections end with, because headings must be distinct.
    """
    schema = model.model_json_schema()
    yield f"## {title}\n\n"
    yield from _section("", schema, schema["$defs"], shared, suffix)


def _section(
    path: str, section: dict[str, Any], defs: dict[str, Any], shared: dict[str, str], suffix: str
) -> Iterator[str]:
    """Yield the table of a section, then the sections below it."""
    if path:
        yield f"### `{path}`{suffix}\n\n{_sentence(section)}\n\n"
    yield "| Field | Type | Default | Description | Example |\n| --- | --- | --- | --- | --- |\n"
    below = []
    required = section.get("required", [])
    for name, field in section["properties"].items():
        where = f"{path}.{name}" if path else name
        target = _target(field, defs)
        default = "required" if name in required else _code(field.get("default"))
        if target:
            anchor = shared.get(target)
            if anchor is None:
                anchor = f"{where}{suffix}".replace(" ", "-").replace(".", "").replace("`", "")
                below.append((where, target))
                if target in _SHARED:
                    shared[target] = anchor
            text = _sentence(field if "description" in field else defs[target])
            default = "required" if name in required else ""
            yield f"| `{name}` | [section](#{anchor}) | {default} | {text} | |\n"
        else:
            example = _example(where, field, name in required)
            kind = _type(field, defs)
            yield f"| `{name}` | {kind} | {default} | {_sentence(field)} | {example} |\n"
    yield "\n"
    for where, target in below:
        yield from _section(where, defs[target], defs, shared, suffix)


def _target(field: dict[str, Any], defs: dict[str, Any]) -> str | None:
    """Return the name of the section that a field holds, if it holds one."""
    options = [field, *field.get("anyOf", []), *field.get("allOf", []), field.get("items", {})]
    names = [option["$ref"].rpartition("/")[2] for option in options if "$ref" in option]
    return next((name for name in names if "properties" in defs[name]), None)


def _type(field: dict[str, Any], defs: dict[str, Any]) -> str:
    if "enum" in field:
        return ", ".join(_code(value) for value in field["enum"])
    if "const" in field:
        return _code(field["const"])
    if "anyOf" in field:
        return " or ".join(_type(o, defs) for o in field["anyOf"] if o.get("type") != "null")
    if "$ref" in field:
        return _type(defs[field["$ref"].rpartition("/")[2]], defs)
    if field.get("type") == "array":
        if "prefixItems" in field:
            return f"[{', '.join(_type(item, defs) for item in field['prefixItems'])}]"
        return f"list of {_type(field.get('items', {}), defs)}"
    bounds = [
        f"{sign} {field[key]}"
        for key, sign in (
            ("exclusiveMinimum", ">"),
            ("minimum", "≥"),
            ("maximum", "≤"),
            ("multipleOf", "multiple of"),
        )
        if key in field
    ]
    return " ".join([str(field.get("type", "")), ", ".join(bounds)]).strip()


def _sentence(field: dict[str, Any]) -> str:
    text = " ".join(field.get("description", "").split())
    if not text:
        raise SystemExit(f"no description: {json.dumps(field)[:200]}")
    return text.replace("|", "\\|")


def _example(where: str, field: dict[str, Any], is_required: bool) -> str:
    examples = field.get("examples", [])
    default = field.get("default")
    if examples:
        return _code(examples[0])
    if is_required or default is None:
        raise SystemExit(f"{where} has no example")
    return _code(default)


def _code(value: Any) -> str:
    text = value if isinstance(value, str) and value else json.dumps(value)
    return f"`{text}`".replace("|", "\\|")


def main() -> int:
    """Write or check the file; return the exit status."""
    text = reference()
    if "--check" not in sys.argv[1:]:
        TARGET.write_text(text)
        return 0
    if TARGET.exists() and TARGET.read_text() == text:
        return 0
    print("docs/config.md is out of date: run python scripts/config_reference.py")
    return 1


if __name__ == "__main__":
    sys.exit(main())
