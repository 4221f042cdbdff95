"""The batch size of a GPU: searched with made-up rates, and remembered in a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from latentcache.vae.batch_search import find_batch_size, remembered_batch_size


class Gpu:
    """Gives images/s by batch size, up to what fits; counts what it was asked."""

    def __init__(self, rate: Callable[[int], float], fits: int = 10**9) -> None:
        self._rate, self._fits = rate, fits
        self.asked: list[int] = []

    def __call__(self, batch_size: int) -> float:
        self.asked.append(batch_size)
        if batch_size > self._fits:
            raise torch.OutOfMemoryError("planted")
        return self._rate(batch_size)


def saturating(half: float) -> Callable[[int], float]:
    return lambda size: 1000 * size / (size + half)


@pytest.mark.parametrize(
    ("rate", "fits", "most", "expected", "last"),
    [
        (saturating(1.0), 128, 128, 32, 64),  # 970, and after it 985
        (saturating(10.0), 128, 128, 128, 128),  # still rising at the end
        (saturating(10.0), 20, 128, 16, 32),  # as far as it fits
        (saturating(10.0), 128, 4, 4, 4),
        (lambda size: 100.0, 128, 128, 1, 4),  # more gains nothing: no need to try all
        (lambda size: 100.0 if size < 8 else 50.0, 128, 128, 1, 4),
        (lambda size: {1: 50.0, 2: 100.0}.get(size, 101.0), 128, 128, 2, 8),
        (saturating(1.0), 0, 128, 1, 1),  # nothing fits: encoding will say so
    ],
)
def test_the_smallest_batch_size_within_3_percent_of_the_best_rate_is_chosen(
    rate: Callable[[int], float], fits: int, most: int, expected: int, last: int
):
    gpu = Gpu(rate, fits)
    assert find_batch_size(gpu, most) == expected
    assert gpu.asked == [2**k for k in range(last.bit_length())]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "latentcache" / "batch_sizes.json"


def test_the_search_runs_once_for_images_of_about_the_same_size(file: Path):
    gpu = Gpu(saturating(1.0))
    assert remembered_batch_size("a", 256, 256, gpu) == 32
    num_asked = len(gpu.asked)
    for width, height in ((256, 256), (224, 288), (320, 192)):
        assert remembered_batch_size("a", width, height, gpu) == 32
    assert len(gpu.asked) == num_asked
    for encoder, side in (("a", 128), ("b", 256)):
        before = len(gpu.asked)
        assert remembered_batch_size(encoder, side, side, gpu) == 32
        assert len(gpu.asked) > before
    assert len(json.loads(file.read_text())) == 3
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"a, about 65536 px": "many"}', b"\xff"])
def test_a_damaged_cache_file_causes_a_new_search(file: Path, damage: bytes):
    file.parent.mkdir(parents=True)
    file.write_bytes(damage)
    assert remembered_batch_size("a", 256, 256, Gpu(saturating(1.0))) == 32
    assert json.loads(file.read_text()) == {"a, about 65536 px": 32}


def test_a_cache_file_that_cannot_be_written_causes_a_new_search(file: Path):
    file.parent.parent.write_bytes(b"a file where the folder should be")
    for _ in range(2):
        assert remembered_batch_size("a", 256, 256, Gpu(saturating(1.0))) == 32


def test_large_images_limit_the_batch_size(file: Path):
    gpu = Gpu(lambda size: float(size))
    assert remembered_batch_size("a", 1024, 1024, gpu) == 8
    assert remembered_batch_size("a", 8192, 8192, gpu) == 1
