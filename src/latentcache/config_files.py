"""Config files: read, changed by `--set`, and checked."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from latentcache.config_errors import explain
from latentcache.errors import ConfigError
from latentcache.urls import shown
from latentcache.yaml_files import parse_yaml, read_yaml

# Names in the path of an override: no section lies as deep.
_MAX_SECTIONS = 8

FileT = TypeVar("FileT", bound=BaseModel)


def read_config(kind: type[FileT], path: str | Path, overrides: Sequence[str]) -> FileT:
    """Read a YAML file as a config of a kind; see `latentcache.config.load_config`."""
    tree = read_yaml(path)
    for override in overrides:
        _apply(tree, override)
    return parse_tree(kind, tree, str(path))


def parse_tree(kind: type[FileT], tree: Any, origin: str) -> FileT:
    """Check a tree of dicts and lists as a config of a kind.

    Args:
        kind: of config.
        tree: what the file holds.
        origin: what messages call the file.

    Raises:
        ConfigError: a value is wrong; one line for each mistake.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        lines = explain(error, kind)
        raise ConfigError(*(f"{origin}: {line}" for line in lines)) from None


def _apply(tree: Any, override: str) -> None:
    path, equals, text = override.partition("=")
    names = path.split(".")
    if not equals or not all(names) or len(names) > _MAX_SECTIONS:
        raise ConfigError(f"--set {shown(override)}: write it as a.b=value")
    value = parse_yaml(text, f"--set {path}: the value")
    for name in names[:-1]:
        if not isinstance(tree, dict):
            break
        # A copy: a YAML alias makes one dict of two sections, and only one of them is meant.
        tree[name] = {} if tree.get(name) is None else copy.copy(tree[name])
        tree = tree[name]
    if not isinstance(tree, dict):
        raise ConfigError(f"--set {shown(path)} does not lead through sections of the config")
    tree[names[-1]] = value
