"""The public names, and the exception tree as its docstring draws it."""

from __future__ import annotations

import re

import pytest

import latentcache
from latentcache import errors


@pytest.mark.parametrize("name", latentcache.__all__)
def test_every_public_name_can_be_imported_and_has_a_docstring(name: str):
    value = getattr(latentcache, name)
    assert value.__name__ == name
    assert value.__doc__


def test_all_is_sorted_and_matches_dir():
    assert latentcache.__all__ == sorted(latentcache.__all__)
    assert set(latentcache.__all__) <= set(dir(latentcache))
    assert re.fullmatch(r"\d+\.\d+\.\d+", latentcache.__version__)


def test_an_unknown_name_raises_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'open_datasets'"):
        _ = latentcache.open_datasets


def drawn_tree() -> dict[str, tuple[str, int]]:
    """Class name to (parent's name, exit code), as drawn in the docstring."""
    tree: dict[str, tuple[str, int]] = {}
    parents = ["Exception"]
    for line in (errors.__doc__ or "").splitlines():
        if actual := re.match(r"    ([ │├└─]*)(\w+)\s+(?:exit code )?(\d)\b", line):
            depth = len(actual[1]) // 5
            del parents[depth + 1 :]
            tree[actual[2]] = (parents[-1], int(actual[3]))
            parents.append(actual[2])
    return tree


def test_the_exception_tree_in_the_docstring_matches_the_classes():
    real = {
        name: (kind.__base__.__name__, kind.exit_code)
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.LatentCacheError)
    }
    assert drawn_tree() == real
    assert list(drawn_tree()) == list(real), "drawn in the order in which they are defined"


def test_reject_is_not_a_latentcache_error():
    assert not issubclass(errors.Reject, errors.LatentCacheError)
