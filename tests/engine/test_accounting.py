"""No image of a shard is lost, and the bytes of samples under construction are bounded."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentcache import open_dataset, parse_config
from latentcache.engine import run as run_module
from latentcache.engine.attempt import SampleCounts
from latentcache.engine.stages import ByteBudget, SampleBudget
from latentcache.errors import Reject
from latentcache.images.samples import RejectedSample, Sample
from makers import config_tree, png, write_tar
from thread_cluster import ThreadCluster


def test_images_are_counted_in_receipt_manifest_and_summary(
    tmp_path: Path,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    good = png(64, 64)
    members = [("a.png", good), ("a.mask.png", good), ("a.txt", b"x"), ("b.png", b"damaged")]
    members += [("b.depth.png", good), ("c.txt", b"no image"), ("d/._e.png", b"hidden")]
    write_tar(tmp_path / "src" / "000000.tar", members)
    monkeypatch.setattr(run_module, "Cluster", ThreadCluster)
    tree = config_tree(tmp_path, vae={"checkpoint": str(checkpoint)}, rejects={"max_rate": 1})
    summary = run_module.run(parse_config(tree))
    # a is a row and b a reject with an image; each has one extra image.
    assert (summary.num_rows, summary.num_rejects) == (1, 2)
    assert (summary.num_images, summary.num_extra_images) == (4, 2)
    (path,) = (tmp_path / "out" / "commits").iterdir()
    receipt = json.loads(path.read_text())
    assert receipt["record"]["num_images"] == 4
    assert receipt["record"]["num_extra_images"] == 2
    assert receipt["extra_image_fields"] == ["mask.png", "depth.png"]
    manifest = open_dataset(str(tmp_path / "out")).manifest
    assert (manifest.num_images, manifest.num_extra_images) == (4, 2)
    assert "counted but not encoded: mask.png, depth.png" in capsys.readouterr().err


def test_a_plan_counts_the_image_files_of_a_folder(tmp_path: Path, checkpoint: Path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("v1.0.jpg", "x.jpg", "x.png", "x.txt", ".hidden.jpg", "y.gif"):
        (folder / name).write_bytes(b"x")
    os.symlink("nowhere", folder / "z.jpg")
    tree = config_tree(tmp_path, vae={"checkpoint": str(checkpoint)})
    tree["source"] = {"folder": str(folder)}
    assert run_module.make_plan(parse_config(tree)).num_images == 5


samples = st.one_of(
    st.lists(st.sampled_from(["png", "mask.png"]), max_size=2).map(
        lambda extra: Sample("k", b"", {}, tuple(extra))
    ),
    st.integers(0, 3).map(lambda n: RejectedSample("k", Reject("read", "r", "m"), n)),
)


@given(st.lists(samples, max_size=8), st.integers(0, 7))
def test_a_lost_row_or_reject_is_an_error(actual: list[Sample | RejectedSample], lost: int):
    counts = SampleCounts()
    for sample in actual:
        counts.add(sample)
    rows = sum(isinstance(sample, Sample) for sample in actual)
    rejects = [sample for sample in actual if isinstance(sample, RejectedSample)]
    with_image = sum(reject.num_images > 0 for reject in rejects)
    counts.check("unit", rows, len(rejects), with_image)
    if rows:
        with pytest.raises(AssertionError, match="samples were read"):
            counts.check("unit", rows - 1, len(rejects), with_image)
    if rows and rejects and with_image < len(rejects):
        # A row that became a reject without an image: the samples add up, the images do not.
        with pytest.raises(AssertionError, match="images were read"):
            counts.check("unit", rows - 1, len(rejects) + 1, with_image)


def test_two_units_with_large_samples_share_a_budget_without_deadlock():
    fetched, held, peak, lock = ByteBudget(256), [0], [0], threading.Lock()

    def change(num_bytes: int) -> None:
        with lock:
            held[0] += num_bytes
            peak[0] = max(peak[0], held[0])

    def read(sizes: list[int]) -> None:
        budget = SampleBudget(fetched, 200)
        for size in sizes:
            for num_bytes in range(10, size + 1, 10):
                budget.reserve(num_bytes)
            change(size)
            budget.finish(size)
            change(-size)
            fetched.release(size)
        budget.close()

    threads = [threading.Thread(target=read, args=([200, 30, 150, 200, 90],)) for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("latentcache.engine.stages._FREE_BYTES", 20)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert peak[0] <= 256
    assert fetched.acquire(256) >= 0  # all was given back
