"""Read config files, apply `--set` overrides, and check the result."""

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

# Largest number of names in the path of an override. No section is nested as deeply.
_MAX_SECTIONS = 8

FileT = TypeVar("FileT", bound=BaseModel)


def read_config(kind: type[FileT], path: str | Path, overrides: Sequence[str]) -> FileT:
    """Read a YAML file as a config of a kind.

    Args:
        kind: `Config` or `EvalConfig`.
        path: the file.
        overrides: settings `a.b=c` that replace single values; `c` is parsed as YAML.

    Raises:
        ConfigError: the file cannot be read or a value is wrong; see `load_config`.
    """
    tree = read_yaml(path)
    for override in overrides:
        _apply(tree, override)
    return parse_tree(kind, tree, str(path))


def parse_tree(kind: type[FileT], tree: Any, origin: str) -> FileT:
    """Check a tree of dicts and lists as a config of a kind.

    Args:
        kind: `Config` or `EvalConfig`.
        tree: the content of the file.
        origin: the name of the file in messages.

    Raises:
        ConfigError: a value is wrong. The message has one line for each mistake.
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
        # Copy the dict, because with a YAML alias two sections share it, and only one is meant.
        tree[name] = {} if tree.get(name) is None else copy.copy(tree[name])
        tree = tree[name]
    if not isinstance(tree, dict):
        raise ConfigError(f"--set {shown(path)} is not a path through sections of the config")
    tree[names[-1]] = value
