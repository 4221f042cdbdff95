"""YAML that people write, read in bounded time and memory: plain data, or a `ConfigError`.

YAML's own safe loader executes nothing, but it lets aliases multiply a small file into gigabytes,
lets the second of two settings of one name win, and raises errors of many kinds.
"""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from latentcache.errors import ConfigError, first_line

# A config of a million characters would be a list of URLs, which braces or a glob write in a line.
_MAX_BYTES = 2**20
_MAX_DEPTH = 32
_MAX_NODES = 200_000  # with each alias counted as the nodes that it stands for

_MERGE_TAG = "tag:yaml.org,2002:merge"

# libyaml's parser, where PyYAML was built with it: twenty times as fast.
_Safe: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Safe):  # type: ignore[misc]
    """The safe loader, with one kind of error and without settings of one name."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            # Of a date such as 2001-13-45, or of `!!int x`: each of the constructors has its own.
            raise _wrong(f"this value is not what its form or tag says ({error})", node) from error

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Hashable, Any]:
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise _wrong("a name in a mapping is a list or a mapping", key)
                if key.value in seen and key.tag != _MERGE_TAG:
                    raise _wrong(f"{key.value[:60]!r} stands here twice", key)
                seen.add(key.value)
        result: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return result


def _wrong(problem: str, place: yaml.Node | yaml.Event) -> yaml.MarkedYAMLError:
    mark: Any = place.start_mark  # libyaml's marks are a class of their own
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def read_yaml(path: str | Path) -> Any:
    """Read a YAML file.

    Raises:
        ConfigError: it cannot be read, is larger than 1 MiB, or as `parse_yaml`.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        text = data.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        if len(data) <= _MAX_BYTES:
            raise ConfigError(f"cannot read the config {path}: not UTF-8 text") from error
    except ValueError as error:  # a NUL in the path
        raise ConfigError(f"cannot read the config {str(path)!r}: {first_line(error)}") from error
    if len(data) > _MAX_BYTES:
        raise ConfigError(f"the config {path} is larger than {_MAX_BYTES} bytes: shorten it")
    return parse_yaml(text, str(path))


def parse_yaml(text: str, origin: str) -> Any:
    """Read YAML text as dicts, lists and plain values.

    Args:
        text: one YAML document.
        origin: what errors call it.

    Raises:
        ConfigError: it is not valid YAML, or holds two settings of one name, more than 32 levels,
            or more than 200,000 values once its aliases are expanded.
    """
    try:
        _require_small(text)
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise ConfigError(f"{origin} is not valid YAML: {problem}") from error
    except (ValueError, TypeError) as error:  # of the parser, such as a surrogate
        raise ConfigError(f"{origin} is not valid YAML: {first_line(error)}") from error


def _require_small(text: str) -> None:
    """Count the nodes that a document comes to, and its levels, without building it."""
    sizes: dict[str, int] = {}  # of the anchors whose node has ended
    totals, anchors = [0], [""]  # of each open node; the first stands for the document
    for event in yaml.parse(text, _Safe):
        size = 0
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                message = f"the alias {event.anchor!r:.60} stands before its anchor ends"
                raise _wrong(message, event)
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
            most = f"more than {_MAX_DEPTH} levels, or {_MAX_NODES} values with aliases expanded"
            raise _wrong(most, event)
