"""The public names, and the exception tree as its docstring draws it."""

from __future__ import annotations

import re

import pytest

import latentcache
from latentcache import errors


@pytest.mark.parametrize("name", latentcache.__all__)
def test_a_public_name_can_be_imported_and_says_what_it_is(name: str):
    value = getattr(latentcache, name)
    assert value.__name__ == name
    assert value.__doc__


def test_the_names_are_sorted_and_listed():
    assert latentcache.__all__ == sorted(latentcache.__all__)
    assert set(latentcache.__all__) <= set(dir(latentcache))
    assert re.fullmatch(r"\d+\.\d+\.\d+", latentcache.__version__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'open_datasets'"):
        _ = latentcache.open_datasets


def drawn_tree() -> dict[str, tuple[str, int]]:
    """Class name to (parent's name, exit code), as drawn in the docstring."""
    tree: dict[str, tuple[str, int]] = {}
    parents = ["Exception"]
    for line in (errors.__doc__ or "").splitlines():
        if found := re.match(r"    ([ │├└─]*)(\w+)\s+(?:exit code )?(\d)\b", line):
            depth = len(found[1]) // 5
            del parents[depth + 1 :]
            tree[found[2]] = (parents[-1], int(found[3]))
            parents.append(found[2])
    return tree


def test_the_drawn_exception_tree_is_the_real_one():
    real = {
        name: (kind.__base__.__name__, kind.exit_code)
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.LatentCacheError)
    }
    assert drawn_tree() == real
    assert list(drawn_tree()) == list(real), "drawn in the order in which they are defined"


def test_a_reject_is_no_error_of_the_program():
    assert not issubclass(errors.Reject, errors.LatentCacheError)
