"""One unit from tar to files, without Ray, against Pillow and diffusers."""

from __future__ import annotations

import copy
import errno
import gc
import hashlib
import io
import math
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn

import diffusers
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from checkpoints import TINY_KL_F8, make_reference
from latentcache import KLAutoencoder, load_vae, make_plan, parse_config
from latentcache.dataset.bucket import Bucket
from latentcache.dataset.columns import columns_of
from latentcache.dataset.contract import Contract
from latentcache.dataset.receipts import DataFile, Receipt, Unit, new_attempt
from latentcache.dataset.shards import RejectRow, iterate_latents
from latentcache.engine import attempt as attempt_module
from latentcache.engine import unit as unit_module
from latentcache.engine.job import Job, UnitFailure, UnitTask
from latentcache.engine.stages import ByteBudget, OldestFirstPool
from latentcache.engine.unit import UnitRunner
from latentcache.errors import DiskFull
from latentcache.metrics import drift_db
from latentcache.storage_options import StorageOptions
from latentcache.vae.encoder import LatentEncoder
from makers import config_tree, draw, encode_image, png, write_tar

HANG_S = 60.0
SIZE = 64

# Our resize is within 2 levels of Pillow's, 38 dB of these random weights' latents. Another
# filter is 22 dB away, a crop off by one pixel 7 dB.
RESIZED_DB = 34.0


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> KLAutoencoder:
    return load_vae(str(checkpoint), decoder=False)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> diffusers.AutoencoderKL:
    """Return the model of diffusers, from the same files."""
    return diffusers.AutoencoderKL.from_pretrained(checkpoint, low_cpu_mem_usage=False).eval()


@dataclass
class Bench:
    """A runner over `<folder>/src/*.tar`, and its staging and output folders."""

    folder: Path
    runner: UnitRunner
    units: list[Unit]

    def run(self, index: int = 0, generation: int = 0) -> Receipt | UnitFailure:
        return self.runner.run(UnitTask(self.units[index], generation, new_attempt()))

    def receipt(self, index: int = 0) -> Receipt:
        receipt = self.run(index)
        assert isinstance(receipt, Receipt), receipt
        return receipt

    def failure(self, index: int = 0) -> UnitFailure:
        failure = self.run(index)
        assert isinstance(failure, UnitFailure), failure
        return failure

    def rows(self, receipt: Receipt) -> dict[str, dict[str, Tensor]]:
        """Bucket to key to latent, in the order of the files."""
        actual: dict[str, list[DataFile]] = {}
        for file in receipt.record.files:
            actual.setdefault(file.bucket, []).append(file)
        return {
            bucket: dict(iterate_latents([self.folder / "out" / file.path for file in files]))
            for bucket, files in actual.items()
        }

    def only_bucket(self, receipt: Receipt) -> dict[str, Tensor]:
        (rows,) = self.rows(receipt).values()
        return rows

    def table(self, receipt: Receipt) -> list[dict[str, Any]]:
        paths = [self.folder / "out" / f.path for f in receipt.record.files]
        return [row for path in paths if path.suffix == ".parquet" for row in read_rows(path)]

    def rejects(self, receipt: Receipt) -> list[RejectRow]:
        file = receipt.record.rejects
        return (
            [RejectRow(**row) for row in read_rows(self.folder / "out" / file.path)] if file else []
        )


def read_rows(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


@contextmanager
def bench(
    folder: Path,
    checkpoint: Path,
    vae: KLAutoencoder,
    batch_size: int = 3,
    decode_threads: int = 2,
    **sections: Any,
) -> Iterator[Bench]:
    config = parse_config(config_tree(folder, vae={"checkpoint": str(checkpoint)}, **sections))
    plan = make_plan(config)
    job = Job(
        contract=plan.contract,
        columns=columns_of(config.source.keep),
        checkpoint=config.vae.checkpoint,
        checkpoint_storage=StorageOptions(),
        source_storage=StorageOptions(),
        output_url=plan.output.url,
        output_storage=StorageOptions(),
        batch_size=batch_size,
        decode_threads=decode_threads,
    )
    # Through `vae.encode`, which a test may have spoilt.
    runner = UnitRunner(job, LatentEncoder(vae, "fp32", batch_size, encode=vae.encode))
    yield Bench(folder, runner, plan.units)
    runner.decode_pool.close()
    runner.encode_pool.close()


@pytest.fixture(autouse=True)
def staging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Whatever a test does, no thread of it is left, and nothing in the staging folder."""
    folder = tmp_path / "staging"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    before = set(threading.enumerate())
    yield folder
    assert not [thread for thread in set(threading.enumerate()) - before if thread.is_alive()]
    assert not list(folder.iterdir())


Make = Callable[..., Any]


@pytest.fixture
def make(tmp_path: Path, checkpoint: Path, loaded: KLAutoencoder) -> Make:
    """Return a function that opens a bench on this test's folder.

    Use it as `with make(transform=…) as bench`.
    """

    def open_bench(vae: KLAutoencoder = loaded, **sections: Any) -> Any:
        return bench(tmp_path, checkpoint, vae, **sections)

    return open_bench


# The oracle: Pillow decodes, resizes and crops, diffusers encodes.


def pillow_pixels(data: bytes, width: int, height: int) -> Tensor:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = max(Fraction(width, image.width), Fraction(height, image.height))
    size = tuple(math.floor(side * scale + Fraction(1, 2)) for side in image.size)
    resized = image.resize(size, Image.Resampling.BICUBIC) if size != image.size else image
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    crop = np.array(resized.crop((left, top, left + width, top + height)))
    return torch.from_numpy(crop).permute(2, 0, 1)


@torch.inference_mode()
def diffusers_moments(reference: diffusers.AutoencoderKL, pixels: Tensor) -> Tensor:
    posterior = reference.encode(pixels[None].float() / 127.5 - 1).latent_dist
    return torch.cat([posterior.mean, posterior.logvar], dim=1)[0]


def shard(folder: Path, images: dict[str, bytes], name: str = "000000") -> Path:
    members = [
        member
        for key, data in images.items()
        for member in ((key, data), (f"{key.rsplit('.', 1)[0]}.txt", f"text of {key}".encode()))
    ]
    return write_tar(folder / "src" / f"{name}.tar", members)


def test_rows_equal_pillow_and_diffusers_in_source_order(
    tmp_path: Path, make: Make, reference: diffusers.AutoencoderKL
):
    images = {
        "c.png": png(SIZE, SIZE, 1),  # as it is: not resized, so to float32's precision
        "a.jpg": encode_image(draw(200, 120, 2), "jpeg"),
        "b.webp": encode_image(draw(90, 300, 3), "webp"),
        "dir/e.png": png(40, 30, 4),  # enlarged
        "d.png": png(SIZE, SIZE, 5),
    }
    shard(tmp_path, images)
    with make(latents={"dtype": "float32"}) as bench:
        receipt = bench.receipt()
        rows = bench.only_bucket(receipt)
    assert list(rows) == ["c", "a", "b", "dir/e", "d"]
    for (name, data), latent in zip(images.items(), rows.values(), strict=True):
        expected = diffusers_moments(reference, pillow_pixels(data, SIZE, SIZE))[:4]
        assert latent.shape == (4, 8, 8)
        if name in ("c.png", "d.png"):
            torch.testing.assert_close(latent, expected, rtol=1e-4, atol=1e-4)
        assert drift_db(latent[None], expected[None]) > RESIZED_DB, name
    (file,) = receipt.record.files
    assert file.bucket == "64x64"
    record = receipt.record
    assert (record.num_samples, record.num_rows, record.num_rejects) == (5, 5, 0)
    assert record.rejects is None


def test_columns_hold_key_size_crop_and_caption(tmp_path: Path, make: Make):
    shard(tmp_path, {"a.png": png(100, 200), "b.png": png(300, 64), "c.png": png(64, 64)})
    with make() as bench:
        rows = bench.table(bench.receipt())
    names = ("key", "original_width", "original_height", "crop_top", "crop_left", "caption")
    assert [tuple(row[name] for name in names) for row in rows] == [
        ("a", 100, 200, 32, 0, "text of a.png"),
        ("b", 300, 64, 0, 118, "text of b.png"),
        ("c", 64, 64, 0, 0, "text of c.png"),
    ]
    assert {row["latent_dtype"] for row in rows} == {"float16"}


def test_receipt_describes_the_uploaded_files(tmp_path: Path, make: Make):
    shard(tmp_path, {f"{index}.png": png(64, 64, index) for index in range(7)})
    with make() as bench:
        receipt = bench.receipt()
        latents = torch.stack(list(bench.only_bucket(receipt).values())).double().numpy()
    (file,) = receipt.record.files
    unit = bench.units[0]
    assert file.path.startswith(f"data/{unit.id}/0-{receipt.record.attempt}-64x64.")
    data = (tmp_path / "out" / file.path).read_bytes()
    assert (file.size_bytes, file.num_rows) == (len(data), 7)
    assert file.sha256 == hashlib.sha256(data).hexdigest()
    assert receipt.contract_fingerprint == bench.runner.job.contract.fingerprint
    channels = latents.transpose(1, 0, 2, 3).reshape(4, -1)
    np.testing.assert_allclose(receipt.statistics.mean, channels.mean(axis=1), atol=1e-12)
    np.testing.assert_allclose(receipt.statistics.std, channels.std(axis=1), rtol=1e-12)
    assert receipt.stages
    assert receipt.stages.keys() == {"fetch", "decode", "encode", "write", "qa", "upload"}
    assert receipt.stages["encode"]["busy_s"] > 0
    threads = {stage: times["num_threads"] for stage, times in receipt.stages.items()}
    assert threads["decode"] == 2
    assert threads["encode"] == bench.runner.encode_pool.num_threads
    assert receipt.elapsed_s
    for stage, times in receipt.stages.items():
        assert 0 <= times["wait_s"] <= receipt.elapsed_s, stage
        assert 0 <= times["busy_s"] <= receipt.elapsed_s * threads[stage], stage
    assert receipt.notes == {"encoded_again_in_fp32": 0}
    assert Receipt.from_bytes(receipt.to_bytes()).record == receipt.record
    assert not (tmp_path / "out" / "commits").exists(), "committing is the driver's"


def test_each_bucket_has_its_own_file(
    tmp_path: Path, make: Make, reference: diffusers.AutoencoderKL
):
    sizes = [(64, 64), (130, 64), (65, 64), (60, 125), (200, 100), (64, 66), (64, 130)]
    images = {f"{index}.png": png(*size, index) for index, size in enumerate(sizes)}
    shard(tmp_path, images)
    buckets = [[64, 64], [96, 48], [48, 96]]
    with make(transform={"buckets": buckets}, latents={"dtype": "float32"}) as bench:
        receipt = bench.receipt()
        rows = bench.rows(receipt)
    assert {bucket: list(actual) for bucket, actual in rows.items()} == {
        "64x64": ["0", "2", "5"],
        "96x48": ["1", "4"],
        "48x96": ["3", "6"],
    }
    for bucket, actual in rows.items():
        width, height = Bucket.parse(bucket)
        for key, latent in actual.items():
            pixels = pillow_pixels(images[f"{key}.png"], width, height)
            expected = diffusers_moments(reference, pixels)[:4]
            assert drift_db(latent[None], expected[None]) > RESIZED_DB
    assert {f.bucket: f.num_rows for f in receipt.record.files} == {
        "64x64": 3,
        "96x48": 2,
        "48x96": 2,
    }


@pytest.mark.parametrize("format", ["parquet", "safetensors"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_moments_are_stored_in_the_configured_dtype(
    tmp_path: Path, make: Make, reference: diffusers.AutoencoderKL, dtype: str, format: str
):
    data = png(SIZE, SIZE, 3)
    shard(tmp_path, {"a.png": data})
    with make(latents={"posterior": "moments", "dtype": dtype, "format": format}) as bench:
        (latent,) = bench.only_bucket(bench.receipt()).values()
    assert latent.shape == (8, 8, 8)
    assert latent.dtype == getattr(torch, dtype)
    expected = diffusers_moments(reference, pillow_pixels(data, SIZE, SIZE))
    tolerance = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 1e-4}[dtype]
    torch.testing.assert_close(latent.float(), expected, rtol=tolerance, atol=tolerance)


def test_posterior_samples_are_deterministic_and_average_to_the_mean(
    tmp_path: Path, make: Make, reference: diffusers.AutoencoderKL
):
    num = 64
    data = png(SIZE, SIZE, 3)
    shard(tmp_path, {f"{index}.png": data for index in range(num)})
    latents = {"posterior": "sample", "dtype": "float32"}
    with make(latents=latents, batch_size=16) as bench:
        first, second = (bench.only_bucket(bench.receipt()) for _ in range(2))
    with make(latents=latents, batch_size=5) as bench:
        other_batches = bench.only_bucket(bench.receipt())
    drawn = torch.stack(list(first.values()))
    assert torch.equal(drawn, torch.stack(list(second.values())))
    torch.testing.assert_close(drawn, torch.stack(list(other_batches.values())))
    mean, logvar = diffusers_moments(reference, pillow_pixels(data, SIZE, SIZE)).chunk(2)
    std = torch.exp(0.5 * logvar)
    assert not torch.equal(drawn[0], drawn[1]), "each key has noise of its own"
    standard = (drawn - mean) / std
    # 256 values, 64 draws each, and all 16,384 together.
    assert standard.mean(dim=0).abs().max() < 5 / math.sqrt(num)
    assert standard.mean().abs() < 5 / math.sqrt(standard.numel())
    assert standard.std() == pytest.approx(1.0, abs=0.05)


# Samples that cannot become rows.


def test_bad_samples_are_rejects_with_reasons_and_the_others_are_kept(tmp_path: Path, make: Make):
    good = png(64, 64)
    members = [
        ("ok1.png", good),
        ("ok1.txt", b"fine"),
        ("notimage.jpg", b"this is text"),
        ("cut.png", good[: len(good) // 2]),
        ("latin.png", good),
        ("latin.txt", b"caf\xe9"),
        ("binary.png", good),
        ("binary.txt", b"caf\xe9\x81"),
        ("hash.png", good),
        ("hash.cls", b"9223372036854775808"),
        ("class.png", good),
        ("class.cls", b"seven"),
        ("lonely.txt", b"no image"),
        ("small.png", png(7, 300)),
        ("ok2.png", good),
        ("ok2.cls", b"7"),
        ("ok2.json", b'{"a": "\xc3\xbc"}'),
        ("ok1.png", good),
    ]
    write_tar(tmp_path / "src" / "000000.tar", members)
    with make(source={"keep": ["txt", "cls", "json"]}, transform={"min_side_px": 8}) as bench:
        receipt = bench.receipt()
        rows = bench.table(receipt)
        rejects = bench.rejects(receipt)
    assert [(row["key"], row["caption"], row["cls"], row["json"]) for row in rows] == [
        ("ok1", "fine", None, None),
        ("latin", "café", None, None),
        ("ok2", None, 7, '{"a": "ü"}'),
    ]
    assert {(reject.key, reject.stage, reject.reason) for reject in rejects} == {
        ("notimage", "decode", "not_an_image"),
        ("cut", "decode", "truncated_image"),
        ("binary", "read", "bad_field"),
        ("hash", "read", "bad_field"),
        ("class", "read", "bad_field"),
        ("lonely", "read", "no_image"),
        ("small", "transform", "too_small"),
        ("ok1", "read", "duplicate_key"),
    }
    assert all(reject.message and "\n" not in reject.message for reject in rejects)
    record = receipt.record
    assert (record.num_samples, record.num_rows, record.num_rejects) == (11, 3, 8)
    assert record.rejects
    assert record.rejects.num_rows == 8
    assert receipt.notes["text_as_cp1252"] == 1


@pytest.mark.parametrize("data", [b"", b"not a tar"])
def test_a_shard_without_samples_is_one_reject_without_a_key(
    tmp_path: Path, make: Make, data: bytes
):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "000000.tar").write_bytes(data)
    with make() as bench:
        receipt = bench.receipt()
        assert [(r.key, r.stage) for r in bench.rejects(receipt)] == [(None, "read")]
    assert receipt.record.files == ()
    assert receipt.statistics.count == 0


class NotANumber:
    """Makes a VAE give NaN for one picture: beside others only, or always."""

    def __init__(self, vae: KLAutoencoder, images: dict[str, bytes]) -> None:
        self.vae = copy.deepcopy(vae)
        self._encode = self.vae.encode
        pixels = {n: pillow_pixels(d, SIZE, SIZE) for n, d in images.items()}
        self._always, self._in_company = pixels["always"], pixels["in_company"]
        self.vae.encode = self._spoil  # type: ignore[method-assign]

    def _spoil(self, images: Tensor) -> Tensor:
        moments = self._encode(images)
        for index, image in enumerate(images):
            if torch.equal(image, self._always):
                moments[index, 6, 3, 1] = math.nan  # in the log-variance alone: the mean looks well
            if torch.equal(image, self._in_company) and len(images) > 1:
                moments[index, 2, 3, 1] = math.nan
        return moments


def test_nonfinite_latents_are_encoded_again_in_fp32_or_rejected(
    tmp_path: Path, make: Make, loaded: KLAutoencoder, reference: diffusers.AutoencoderKL
):
    images = {
        name: png(SIZE, SIZE, seed)
        for seed, name in enumerate(["one", "always", "in_company", "four"])
    }
    shard(tmp_path, {f"{name}.png": data for name, data in images.items()})
    vae = NotANumber(loaded, images).vae
    with make(vae, latents={"dtype": "float32"}, batch_size=4) as bench:
        receipt = bench.receipt()
        rows = bench.only_bucket(receipt)
        (reject,) = bench.rejects(receipt)
    assert list(rows) == ["one", "in_company", "four"]
    for name, latent in rows.items():
        expected = diffusers_moments(reference, pillow_pixels(images[name], SIZE, SIZE))[:4]
        torch.testing.assert_close(latent, expected, rtol=1e-4, atol=1e-4)
    assert (reject.key, reject.stage, reject.reason) == ("always", "encode", "not_finite")
    assert receipt.notes == {"encoded_again_in_fp32": 1}
    assert np.isfinite(receipt.statistics.mean).all()
    assert receipt.statistics.count == 3 * 64


def test_a_latent_that_overflows_its_dtype_is_a_reject(
    tmp_path: Path, checkpoint: Path, make: Make
):
    reference = make_reference(TINY_KL_F8)
    reference.quant_conv.weight.data *= 1e6
    folder = tmp_path / "huge"
    reference.save_pretrained(folder)
    vae = load_vae(str(folder), decoder=False)
    shard(tmp_path, {"a.png": png(64, 64)})
    for dtype, num_rows in (("float16", 0), ("bfloat16", 1), ("float32", 1)):
        with make(vae, latents={"dtype": dtype}) as bench:
            receipt = bench.receipt()
            assert receipt.record.num_rows == num_rows
            assert [r.reason for r in bench.rejects(receipt)] == ["not_finite"] * (1 - num_rows)


# Units at the same time, and units that fail.


def test_two_concurrent_units_give_the_same_rows_as_one_by_one(tmp_path: Path, make: Make):
    for number in range(2):
        images = {f"{i}.png": png(64 + 8 * (i % 3), 64, 10 * number + i) for i in range(20)}
        images["bad.jpg"] = b"text"
        shard(tmp_path, images, f"{number:06d}")
    buckets = {"buckets": [[64, 64], [72, 64]]}
    with make(transform=buckets, latents={"dtype": "float32"}) as bench:
        alone = [bench.receipt(index) for index in range(2)]
        with ThreadPoolExecutor(2) as threads:
            together = list(threads.map(bench.receipt, range(2)))
        for one, other in zip(alone, together, strict=True):
            assert one.record.attempt != other.record.attempt
            assert bench.rejects(one) == bench.rejects(other)
            rows, same = bench.rows(one), bench.rows(other)
            assert {b: list(r) for b, r in rows.items()} == {b: list(r) for b, r in same.items()}
            for bucket, actual in rows.items():
                for key, latent in actual.items():
                    assert torch.equal(latent, same[bucket][key])
        stats = bench.runner.totals.stats()
    assert stats["num_rows"] == 4 * 20
    assert stats["num_rejects"] == 4
    assert stats["encode_busy_s"] > 0


def test_two_units_run_concurrently(tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch):
    """Each unit's first picture is decoded only when the other's is: alone they would hang."""
    for number in range(2):
        shard(tmp_path, {"a.png": png(64, 64, number)}, f"{number:06d}")
    barrier = threading.Barrier(2)
    decode = unit_module.load_image

    def meet(*args: Any) -> Any:
        barrier.wait(HANG_S)
        return decode(*args)

    monkeypatch.setattr(unit_module, "load_image", meet)
    with make() as bench, ThreadPoolExecutor(2) as threads:
        receipts = list(threads.map(bench.receipt, range(2)))
    assert [receipt.record.num_rows for receipt in receipts] == [1, 1]


def test_the_encoder_never_waits_between_shards(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
):
    """Each batch is encoded only once the next one waits, of the next shard too: else it hangs."""
    num_units, images_each, batch_size = 5, 16, 8
    for number in range(num_units):
        images = {f"{i}.png": png(64, 64, 10 * number + i) for i in range(images_each)}
        shard(tmp_path, images, f"{number:06d}")
    num_left = num_units * images_each // batch_size
    queued, changed = 0, threading.Condition()
    with make(batch_size=batch_size) as bench, ThreadPoolExecutor(2) as threads:
        bench.runner.encode_pool.close()
        bench.runner.encode_pool = OldestFirstPool("encode", 1)
        submit, start = bench.runner.encode_pool.submit, bench.runner.encoder.start

        def count_in(*args: Any) -> Any:
            nonlocal queued
            with changed:
                queued += 1
                changed.notify_all()
            return submit(*args)

        def encode_when_another_waits(images: Tensor) -> Any:
            nonlocal queued, num_left
            with changed:
                num_left -= 1
                assert changed.wait_for(lambda: queued > 1 or not num_left, HANG_S)
                queued -= 1
            return start(images)

        monkeypatch.setattr(bench.runner.encode_pool, "submit", count_in)
        monkeypatch.setattr(bench.runner.encoder, "start", encode_when_another_waits)
        receipts = list(threads.map(bench.receipt, range(num_units)))
    assert [receipt.record.num_rows for receipt in receipts] == [images_each] * num_units
    assert num_left == 0


class RecordedBudget(ByteBudget):
    """Remembers how much was held at most: by several together, and by one alone."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__(num_bytes)
        self.sizes: list[int] = []
        self.shared = self.alone = 0
        self._lock = threading.Lock()

    def acquire(self, num_bytes: int) -> float:
        waited_s = super().acquire(num_bytes)
        with self._lock:
            self.sizes += [num_bytes] if num_bytes else []
            if len(self.sizes) > 1:
                self.shared = max(self.shared, sum(self.sizes))
            else:
                self.alone = max(self.alone, num_bytes)
        return waited_s

    def release(self, num_bytes: int) -> None:
        with self._lock:
            if num_bytes:
                self.sizes.remove(num_bytes)
        super().release(num_bytes)


def test_bytes_in_flight_are_bounded_for_images_of_any_size(tmp_path: Path, make: Make):
    """Two units at once on 16 threads, and some images larger than a budget."""
    sizes = [64, 90, 300, 70, 800, 64, 100, 200]
    for number in range(2):
        images = {f"{i}.jpg": encode_image(draw(s, s, i), "jpeg") for i, s in enumerate(sizes * 5)}
        images["cut.jpg"] = images["4.jpg"][:-2000]
        shard(tmp_path, images, f"{number:06d}")
    with make(decode_threads=16) as bench, ThreadPoolExecutor(2) as threads:
        runner = bench.runner
        runner.fetched = fetched = RecordedBudget(20_000)
        runner.decoding = decoding = RecordedBudget(300 * 300 * 3)
        runner.batched = batched = RecordedBudget(5 * 64 * 64 * 3)
        receipts = list(threads.map(bench.receipt, range(2)))
    assert [r.record.num_rows for r in receipts] == [40, 40]
    assert [r.record.num_rejects for r in receipts] == [1, 1]
    for budget in (fetched, decoding, batched):
        assert not budget.sizes, "all is given back"
        assert budget.shared <= budget._num_bytes
        assert budget.alone
    assert fetched.alone > 20_000
    assert decoding.alone >= 3 * 800 * 800 > 300 * 300 * 3
    assert max(fetched.shared, decoding.shared) > 0


@pytest.fixture
def many(tmp_path: Path) -> None:
    """More pictures than fit in the queues, so that stages are busy or wait for a full queue."""
    data = [png(64, 64, seed) for seed in range(4)]
    shard(tmp_path, {f"{index:03d}.png": data[index % 4] for index in range(120)})


def check_recovery(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failure the same runner still works, and the failure left no file."""
    monkeypatch.undo()
    data = bench.folder / "out" / "data"
    assert not list(data.rglob("*")) if data.exists() else True
    assert bench.receipt().record.num_rows == 120


@pytest.mark.usefixtures("many")
def test_a_fault_in_decoding_fails_the_unit_alone(
    make: Make, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    calls = iter(range(10**6))
    decode = unit_module.load_image

    def fail_once(*args: Any) -> Any:
        if next(calls) == 40:
            raise RuntimeError("planted in decode")
        return decode(*args)

    with make() as bench:
        with monkeypatch.context() as patch:
            patch.setattr(unit_module, "load_image", fail_once)
            failure = bench.failure()
        assert bench.units[0].source in failure.message
        assert "planted in decode" in failure.message
        assert (failure.changed, failure.fatal) == (False, None)
        assert "planted in decode" in capfd.readouterr().err, "a bug is logged with its traceback"
        check_recovery(bench, monkeypatch)


@pytest.mark.usefixtures("many")
@pytest.mark.parametrize(
    ("error", "fatal"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EIO, "I/O error"), False),
        (ValueError("planted in write"), False),
    ],
)
def test_a_fault_in_writing_fails_the_unit(
    make: Make, monkeypatch: pytest.MonkeyPatch, error: Exception, fatal: bool
):
    append = attempt_module.BucketWriter.append
    calls = iter(range(10**6))

    def fail(self: Any, *args: Any) -> None:
        if next(calls) == 2:
            raise copy.copy(error)  # pytest keeps the one it was given, and its traceback with it
        append(self, *args)

    with make(latents={"format": "safetensors"}) as bench:
        with monkeypatch.context() as patch:
            patch.setattr(attempt_module.BucketWriter, "append", fail)
            failure = bench.failure()
        gc.collect()  # a tensor file left open is a ResourceWarning now, which is an error
        assert isinstance(failure.fatal, DiskFull) == fatal
        assert ("TMPDIR" in failure.message) == fatal
        check_recovery(bench, monkeypatch)


@pytest.mark.usefixtures("many")
def test_a_fault_in_encoding_fails_the_unit(
    make: Make, loaded: KLAutoencoder, monkeypatch: pytest.MonkeyPatch
):
    with make() as bench:
        with monkeypatch.context() as patch:

            def fail(images: Tensor) -> None:
                raise torch.OutOfMemoryError("planted: not even one image fits")

            patch.setattr(bench.runner.encoder, "start", fail)
            assert "not even one image fits" in bench.failure().message
        check_recovery(bench, monkeypatch)


@pytest.mark.usefixtures("many")
def test_a_source_that_changes_while_it_is_read_is_a_failure_marked_changed(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "src" / "000000.tar"
    decode = unit_module.load_image

    def overwrite(*args: Any) -> Any:
        if path.stat().st_size > 10_000:
            path.write_bytes(b"other")
        return decode(*args)

    with make() as bench:
        monkeypatch.setattr(unit_module, "load_image", overwrite)
        failure = bench.failure()
    assert failure.changed
    assert "000000.tar" in failure.message
    assert not (tmp_path / "out" / "data").exists()


@pytest.mark.usefixtures("many")
def test_a_missing_source_is_a_failure_marked_changed(tmp_path: Path, make: Make):
    with make() as bench:
        (tmp_path / "src" / "000000.tar").unlink()
        failure = bench.failure()
    assert "000000.tar" in failure.message
    assert failure.changed


@pytest.mark.usefixtures("many")
def test_an_output_that_cannot_be_written_fails_the_unit(tmp_path: Path, make: Make):
    with make() as bench:
        (tmp_path / "out").write_text("a file stands where the folder should")
        failure = bench.failure()
    assert f"{tmp_path}/out" in failure.message


def test_unit_ids_depend_on_the_contract(tmp_path: Path, make: Make):
    shard(tmp_path, {"a.png": png(64, 64)})
    ids, contracts = [], []
    for size in (64, 128):
        with make(transform={"resolution_px": size}) as bench:
            ids.append(bench.units[0].id)
            contracts.append(bench.runner.job.contract)
    assert ids[0] != ids[1]
    assert isinstance(contracts[0], Contract)
    assert replace(contracts[0], transform=contracts[1].transform) == contracts[1]


def test_a_lost_gpu_ends_the_process_and_fails_no_unit(
    tmp_path: Path, make: Make, loaded: KLAutoencoder, monkeypatch: pytest.MonkeyPatch
):
    """What a CUDA context says for ever after an illegal access, here without a GPU."""
    from latentcache.engine.cluster import _EncoderActor

    def end(code: int) -> NoReturn:
        raise SystemExit(code)

    def encode(*_: Any) -> NoReturn:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    shard(tmp_path, {"a.png": png(SIZE, SIZE, 1)})
    spoilt = copy.copy(loaded)
    spoilt.encode = encode  # type: ignore[method-assign]
    monkeypatch.setattr("os._exit", end)
    with make(spoilt) as bench:
        actor = _EncoderActor.__new__(_EncoderActor)
        actor._runner = bench.runner
        with pytest.raises(SystemExit):
            actor.run_unit(UnitTask(bench.units[0], 0, new_attempt()))
