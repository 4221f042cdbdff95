"""The demo shards are what they say: readable, varied, repeatable, and broken as counted."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from latentcache.dataset.bucket import Bucket
from latentcache.demo.demo_data import DemoData, write_demo_data
from latentcache.errors import Reject
from latentcache.images.decode import decode_image
from latentcache.images.source import RejectedSample, list_shards, read_shard
from latentcache.images.transform import TransformSpec, transform
from latentcache.storage_options import StorageOptions

pytestmark = pytest.mark.slow

OPTIONS = StorageOptions()
SPEC = TransformSpec((Bucket(64, 64),), min_side_px=32, max_upscale=None, max_pixels=10**6)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DemoData]:
    folder = tmp_path_factory.mktemp("demo") / "made"
    return folder, write_demo_data(folder, num_shards=5, samples_per_shard=13)


def test_samples_are_readable_and_broken_ones_are_counted_by_reason(
    demo: tuple[Path, DemoData],
):
    folder, made = demo
    forms, shapes, reasons = set(), set(), Counter()
    shards = list_shards(f"{folder}/demo-{{000000..000004}}.tar", OPTIONS)
    for shard in shards:
        for sample in read_shard(
            shard, image=("jpg", "png", "webp"), keep=("txt", "json"), options=OPTIONS
        ):
            if isinstance(sample, RejectedSample):
                reasons[sample.reject.reason] += 1
                continue
            assert sample.fields["txt"].decode()
            try:
                pixels = decode_image(sample.image, max_pixels=SPEC.max_pixels)
                transform(pixels, SPEC)
            except Reject as reject:
                reasons[reject.reason] += 1
                continue
            about = json.loads(sample.fields["json"])
            assert pixels.shape == (about["height"], about["width"], 3)
            assert np.ptp(pixels) > 20
            forms.add(about["form"])
            shapes.add(pixels.shape)
    assert reasons == made.num_by_reason
    assert (made.num_shards, made.num_samples, made.num_broken) == (5, 65, sum(reasons.values()))
    assert len(reasons) == 5
    assert asdict(made)["num_by_reason"] == made.num_by_reason  # as `--json` prints it
    assert forms == {
        *("jpeg", "rotated", "webp", "gray", "png", "cmyk", "alpha", "palette", "gray16")
    }
    assert len(shapes) == 60


def test_bytes_depend_only_on_the_seed_and_the_shard(demo: tuple[Path, DemoData], tmp_path: Path):
    folder, _ = demo
    write_demo_data(tmp_path / "again", num_shards=2, samples_per_shard=13)
    write_demo_data(tmp_path / "other", num_shards=1, samples_per_shard=2, seed=1)
    for name in ("demo-000000.tar", "demo-000001.tar"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    first = (tmp_path / "other" / "demo-000000.tar").read_bytes()
    assert not (folder / "demo-000000.tar").read_bytes().startswith(first[:20_000])


def test_broken_false_writes_no_broken_samples(tmp_path: Path):
    made = write_demo_data(tmp_path, num_shards=1, samples_per_shard=3, broken=False)
    assert (made.num_samples, made.num_broken, made.num_by_reason) == (3, 0, {})
    assert write_demo_data(tmp_path, num_shards=1, samples_per_shard=1).num_broken == 0
