"""Read YAML files that users write, in bounded time and memory.

PyYAML's safe loader executes no code. But its aliases can expand a small file into gigabytes, it
accepts two settings of one name, and its errors have many types; here they are `ConfigError`.
"""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from latentcache.errors import ConfigError, first_line

# A larger config would be a list of URLs, which braces or a glob can express in one line.
_MAX_BYTES = 2**20
_MAX_DEPTH = 32
_MAX_NODES = 200_000  # an alias counts as many nodes as it expands to

# The parser of libyaml, if PyYAML was built with it, is twenty times as fast.
_Safe: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Safe):  # type: ignore[misc]
    """The safe loader, with one exception type and without duplicate settings."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            # Each constructor raises its own type, for a date such as 2001-13-45 or for `!!int x`.
            raise _error(f"this value does not match its form or tag ({error})", node) from error

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Hashable, Any]:
        if isinstance(node, yaml.MappingNode):
            names = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise _error("a name in a mapping is a list or a mapping", key)
                if key.value in names and key.tag != "tag:yaml.org,2002:merge":
                    raise _error(f"{key.value[:60]!r} is set twice", key)
                names.add(key.value)
        result: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return result


def _error(problem: str, source: yaml.Node | yaml.Event) -> yaml.MarkedYAMLError:
    mark: Any = source.start_mark  # libyaml has its own class of marks
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def read_yaml(path: str | Path) -> Any:
    """Read a YAML file of at most 1 MiB, with the errors of `parse_yaml`."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from error
    except ValueError as error:  # a NUL in the path
        raise ConfigError(f"cannot read the config {str(path)!r}: {first_line(error)}") from error
    if len(data) > _MAX_BYTES:
        raise ConfigError(f"the config {path} is larger than {_MAX_BYTES} bytes: shorten it")
    try:
        return parse_yaml(data.decode("utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read the config {path}: not UTF-8 text") from error


def parse_yaml(text: str, origin: str) -> Any:
    """Read one YAML document as dicts, lists and plain values.

    Args:
        text, origin: the document, and its name in errors.

    Raises:
        ConfigError: it is not valid, sets a name twice, is too deep, or has too many values.
    """
    try:
        _require_small(text)
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, TypeError) as error:  # a surrogate is a ValueError
        problem = " ".join(str(error).split())
        raise ConfigError(f"{origin} is not valid YAML: {problem}") from error


def _require_small(text: str) -> None:
    """Count the expanded nodes and the levels of a document, without building it."""
    sizes: dict[str, int] = {}  # the sizes of the anchors whose node has ended
    totals, anchors = [0], [""]  # of each open node; the first entry is the document
    for event in yaml.parse(text, _Safe):
        size = 0
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise _error(
                    f"the alias {event.anchor!r:.60} is used before its anchor ends", event
                )
            size = sizes[event.anchor]
        elif isinstance(event, yaml.CollectionStartEvent):
            totals.append(1)
            anchors.append(event.anchor or "")
        elif isinstance(event, yaml.CollectionEndEvent):
            size = totals.pop()
            sizes[anchors.pop()] = size
        elif isinstance(event, yaml.ScalarEvent):
            size = 1
            sizes[event.anchor or ""] = 1
        totals[-1] += size
        if len(totals) > _MAX_DEPTH or totals[-1] > _MAX_NODES:
            limits = f"{_MAX_DEPTH} levels, or {_MAX_NODES} values with aliases expanded"
            raise _error(f"more than {limits}", event)
