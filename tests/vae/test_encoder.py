"""The encoder of a unit: batches, memory, precision, and what is not finite."""

from __future__ import annotations

import copy
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fake_gpu import FakeGpu
from latentcache import KLAutoencoder, load_vae
from latentcache.metrics import drift_db, psnr_db
from latentcache.vae.encoder import LatentEncoder, draw_latents, resolve_precision
from makers import draw


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> KLAutoencoder:
    return load_vae(str(checkpoint), decoder=False)


@pytest.fixture
def vae(loaded: KLAutoencoder) -> KLAutoencoder:
    """A copy to spoil."""
    return copy.deepcopy(loaded)


def images_of(num: int, width: int = 64, height: int = 32) -> Tensor:
    pixels = [np.asarray(draw(width, height, seed)) for seed in range(num)]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()


class Spy:
    """Encodes in a VAE's place: records batch sizes, and may fail above one."""

    def __init__(self, vae: KLAutoencoder, fits: int = 10**9) -> None:
        self._encode = vae.encode
        self.fits = fits
        self.batches: list[int] = []
        self.num_failed = 0

    def __call__(self, images: Tensor) -> Tensor:
        if len(images) > self.fits:
            self.num_failed += 1
            raise torch.OutOfMemoryError("planted")
        self.batches.append(len(images))
        return self._encode(images)


@pytest.mark.parametrize(("num", "batches"), [(1, [1]), (3, [3]), (7, [3, 3, 1]), (6, [3, 3])])
def test_a_batch_is_split_and_equals_one_by_one(vae: KLAutoencoder, num: int, batches: list[int]):
    images = images_of(num)
    one_by_one = torch.cat([vae.encode(images[i : i + 1]) for i in range(num)])
    spy = Spy(vae)
    encoded = LatentEncoder(vae, "fp32", batch_size=3, encode=spy).encode(images)
    assert spy.batches == batches
    assert encoded.moments.shape == (num, 8, 4, 8)
    assert encoded.moments.dtype == torch.float32
    assert (encoded.num_in_fp32, encoded.bad) == (0, ())
    # Convolutions may sum in another order for another batch size.
    torch.testing.assert_close(encoded.moments, one_by_one, rtol=1e-4, atol=1e-4)


def test_the_batch_size_depends_on_the_bucket_unless_it_is_given(vae: KLAutoencoder):
    auto = LatentEncoder(vae, "fp32")
    assert auto.batch_size(256, 256) == 1
    assert auto.batch_size(128, 128) == 4
    assert auto.batch_size(4096, 4096) == 1
    assert LatentEncoder(vae, "fp32", batch_size=7).batch_size(4096, 4096) == 7


def test_out_of_memory_halves_the_batch_size_of_the_bucket_and_keeps_all_images(vae: KLAutoencoder):
    images = images_of(11)
    expected = vae.encode(images)
    spy = Spy(vae, fits=2)
    encoder = LatentEncoder(vae, "fp32", batch_size=8, encode=spy)
    encoded = encoder.encode(images)
    assert spy.num_failed == 2, "8 and 4 do not fit, and 4 is tried once"
    assert max(spy.batches) == 2
    assert sum(spy.batches) == 11
    torch.testing.assert_close(encoded.moments, expected, rtol=1e-4, atol=1e-4)
    # From now on this bucket begins at what fits; another one does not suffer.
    assert encoder.batch_size(64, 32) == 2
    assert encoder.batch_size(32, 64) == 8
    encoder.encode(images)
    assert spy.num_failed == 2


def test_out_of_memory_with_one_image_is_raised(vae: KLAutoencoder):
    spy = Spy(vae, fits=0)
    with pytest.raises(torch.OutOfMemoryError):
        LatentEncoder(vae, "fp32", batch_size=4, encode=spy).encode(images_of(4))
    assert spy.num_failed == 3


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_16_bit_encoding_is_near_fp32_and_does_not_change_the_vae(
    vae: KLAutoencoder, precision: str
):
    images = images_of(2)
    expected = vae.encode(images)
    encoded = LatentEncoder(vae, precision).encode(images)
    assert encoded.moments.dtype == torch.float32
    assert not torch.equal(encoded.moments, expected)
    assert drift_db(encoded.moments, expected) > 30
    assert vae.dtype == torch.float32
    assert torch.equal(vae.encode(images), expected)


def test_images_that_overflow_in_fp16_are_encoded_again_in_fp32(vae: KLAutoencoder):
    """SDXL's VAE does so: its activations leave float16, not float32."""
    vae.encoder.conv_in.weight.data *= 1e6
    images = images_of(3)
    expected = vae.encode(images)
    assert expected.isfinite().all()
    encoded = LatentEncoder(vae, "fp16").encode(images)
    assert (encoded.num_in_fp32, encoded.bad) == (3, ())
    torch.testing.assert_close(encoded.moments, expected, rtol=1e-4, atol=1e-4)


def test_only_images_that_are_not_finite_are_encoded_again_or_reported_as_bad(vae: KLAutoencoder):
    images = images_of(5)
    expected = vae.encode(images)
    encode, calls = vae.encode, []

    def spoilt(pixels: Tensor) -> Tensor:
        """Image 1 fails beside others, image 3 always."""
        calls.append(len(pixels))
        moments = encode(pixels)
        for index, image in enumerate(pixels):
            if torch.equal(image, images[3]) or (len(pixels) > 1 and torch.equal(image, images[1])):
                moments[index, 0, 0, 0] = math.nan
        return moments

    vae.encode = spoilt  # type: ignore[method-assign]
    encoded = LatentEncoder(vae, "fp32", batch_size=5, encode=spoilt).encode(images)
    assert calls == [5, 1, 1]
    assert (encoded.num_in_fp32, encoded.bad) == (1, (3,))
    good = [0, 1, 2, 4]
    torch.testing.assert_close(encoded.moments[good], expected[good], rtol=1e-4, atol=1e-4)


def test_the_number_of_cpu_threads_is_limited_by_memory(
    vae: KLAutoencoder, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    encoder = LatentEncoder(vae, "fp32")
    assert encoder.num_threads(256 * 256) == encoder.num_threads(64 * 64) == 8
    assert encoder.num_threads(1024 * 1024) == 2  # 32 channels, four maps: 512 MiB each
    assert encoder.num_threads(8192 * 8192) == 1
    assert LatentEncoder(vae, "fp32", batch_size=32).num_threads(256 * 256) == 1


def test_a_cpu_starts_batches_on_several_threads_and_any_thread_collects(vae: KLAutoencoder):
    images = images_of(6)
    expected = vae.encode(images)
    encoder = LatentEncoder(vae, "fp32")
    with ThreadPoolExecutor(3) as pool:
        started = list(pool.map(encoder.start, images.split(1)))
    actual = [collect() for collect in reversed(started)][::-1]
    moments = torch.cat([encoded.moments for encoded in actual])
    torch.testing.assert_close(moments, expected, rtol=1e-4, atol=1e-4)
    assert all(0 < encoded.busy_s <= encoded.start_s for encoded in actual)


# How a GPU's encoder uses streams and events, on a stand-in that completes every operation at
# once. bench/gpu_check.py checks the same on a real GPU.


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeGpu:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return FakeGpu(monkeypatch)


def on(gpu: FakeGpu, encoder: LatentEncoder) -> LatentEncoder:
    encoder._gpu = gpu.make()
    return encoder


def test_on_a_gpu_partial_batches_are_padded_and_the_padding_is_removed(
    vae: KLAutoencoder, gpu: FakeGpu
):
    images, spy = images_of(7), Spy(vae)
    encoder = on(gpu, LatentEncoder(vae, "fp32", batch_size=3, encode=spy))
    encoded = encoder.encode(images)
    assert spy.batches == [3, 3, 3]
    torch.testing.assert_close(encoded.moments, vae.encode(images), rtol=1e-4, atol=1e-4)
    assert encoded.busy_s > 0


def test_a_gpu_has_at_most_three_batches_in_progress_and_another_thread_collects(
    vae: KLAutoencoder, gpu: FakeGpu
):
    images, spy = images_of(12), Spy(vae)
    encoder = on(gpu, LatentEncoder(vae, "fp32", batch_size=2, encode=spy))
    started = [encoder.start(part) for part in images.split(2)]
    # Three go at once; each one after that waits for the oldest. No device is synchronised.
    assert gpu.waits == [0, 1, 2]
    with ThreadPoolExecutor(1) as pool:
        actual = [pool.submit(collect).result().moments for collect in started]
    torch.testing.assert_close(torch.cat(actual), vae.encode(images), rtol=1e-4, atol=1e-4)


def test_out_of_memory_on_a_gpu_waits_for_batches_in_progress_before_halving(
    vae: KLAutoencoder, gpu: FakeGpu
):
    images, spy = images_of(12), Spy(vae)
    encoder = on(gpu, LatentEncoder(vae, "fp32", batch_size=4, encode=spy))
    encoder.start(images[:4])
    spy.fits = 2
    encoded = encoder.start(images[4:])()
    assert spy.num_failed == 2, "with a batch in progress, and then without"
    assert spy.batches == [4, 2, 2, 2, 2]
    torch.testing.assert_close(encoded.moments, vae.encode(images[4:]), rtol=1e-4, atol=1e-4)
    spy.fits = 0
    with pytest.raises(torch.OutOfMemoryError):
        encoder.start(images)


def test_on_a_gpu_the_collecting_thread_encodes_again_in_fp32(vae: KLAutoencoder, gpu: FakeGpu):
    images = images_of(5)
    expected = vae.encode(images)

    def overflow(pixels: Tensor) -> Tensor:
        return vae.encode(pixels) * math.inf

    encoder = on(gpu, LatentEncoder(vae, "fp16", batch_size=5, encode=overflow))
    collect = encoder.start(images)
    with ThreadPoolExecutor(1) as pool:
        encoded = pool.submit(collect).result()
    assert (encoded.num_in_fp32, encoded.bad) == (5, ())
    torch.testing.assert_close(encoded.moments, expected, rtol=1e-4, atol=1e-4)


def test_a_gpu_measures_batch_sizes_once_and_caches_the_result(vae: KLAutoencoder, gpu: FakeGpu):
    spies = [Spy(vae, fits=4) for _ in range(3)]
    first, second, other = (on(gpu, LatentEncoder(vae, "fp32", encode=spy)) for spy in spies)
    size = first.batch_size(64, 32)
    assert size in (1, 2, 4)
    assert set(spies[0].batches) == {1, 2, 4}
    assert first.batch_size(64, 32) == second.batch_size(32, 64) == size
    assert not spies[1].batches, "written down for others"
    other.batch_size(128, 128)
    assert spies[2].batches, "images of another size"


def test_a_cpu_resolves_to_fp32(vae: KLAutoencoder):
    assert resolve_precision(vae, list(images_of(2))) == "fp32"
    assert resolve_precision(vae, []) == "fp32"


# What is drawn from the posterior.


def moments_of(num: int, logvar: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn((num, 4, 4, 4), generator=generator)
    return torch.cat([mean, torch.full_like(mean, logvar)], dim=1)


def test_posterior_mean_and_moments_are_the_encoders_output():
    moments = moments_of(3, -1.0)
    keys = ["a", "b", "c"]
    assert torch.equal(draw_latents(moments, "moments", "u", keys), moments)
    assert torch.equal(draw_latents(moments, "mean", "u", keys), moments[:, :4])


def test_a_posterior_sample_depends_only_on_unit_and_key():
    moments = moments_of(3, 0.0)
    drawn = draw_latents(moments, "sample", "u", ["a", "b", "c"])
    assert torch.equal(drawn, draw_latents(moments, "sample", "u", ["a", "b", "c"]))
    # In other company, in another order.
    again = draw_latents(moments[[2, 0]], "sample", "u", ["c", "a"])
    assert torch.equal(again, drawn[[2, 0]])
    noise = drawn - moments[:, :4]
    assert not torch.equal(noise[0], noise[1])
    other_unit = draw_latents(moments, "sample", "v", ["a", "b", "c"]) - moments[:, :4]
    assert not torch.equal(noise, other_unit)
    # The separator: ("u", "ab") and ("ua", "b") are not one sample.
    one = draw_latents(moments[:1], "sample", "u", ["ab"])
    assert not torch.equal(one, draw_latents(moments[:1], "sample", "ua", ["b"]))


def test_posterior_noise_is_the_same_in_all_releases():
    """Rows of one unit that were drawn by two releases must be the same."""
    drawn = draw_latents(torch.zeros(1, 2, 1, 4), "sample", "unit", ["key"])
    expected = [0.1739713, 0.5049616, -0.4968230, 0.6239539]
    assert drawn.flatten().tolist() == pytest.approx(expected, abs=1e-6)


def test_posterior_samples_have_the_mean_and_standard_deviation():
    logvar = -2.0
    moments = moments_of(1, logvar).expand(2000, -1, -1, -1)
    drawn = draw_latents(moments, "sample", "u", [f"k{index}" for index in range(2000)])
    std = math.exp(logvar / 2)
    # 64 values, 2,000 draws each: five standard errors of mean and of deviation.
    assert (drawn.mean(dim=0) - moments[0, :4]).abs().max() < 5 * std / math.sqrt(2000)
    assert (drawn.std(dim=0) - std).abs().max() < 5 * std / math.sqrt(2 * 2000)


# The measures.


def test_psnr_matches_numpy():
    one, other = images_of(4), images_of(5)[1:]
    actual = psnr_db(one, other)
    a, b = one.numpy().astype(np.float64), other.numpy().astype(np.float64)
    expected = 10 * np.log10(255**2 / ((a - b) ** 2).mean(axis=(1, 2, 3)))
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-12)
    assert torch.isinf(psnr_db(one, one)).all()


def test_drift_matches_numpy():
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn((3, 4, 5, 6), generator=generator) + 7
    latents = reference + 1e-3 * torch.randn(reference.shape, generator=generator)
    a, b = latents.double().numpy(), reference.double().numpy()
    signal = ((b - b.mean(axis=(0, 2, 3), keepdims=True)) ** 2).sum()
    expected = 10 * np.log10(signal / ((a - b) ** 2).sum())
    assert drift_db(latents, reference) == pytest.approx(expected, rel=1e-9)
    assert 55 < expected < 65
    assert drift_db(reference, reference) == math.inf
    latents[0, 0, 0, 0] = math.nan
    assert drift_db(latents, reference) == -math.inf
