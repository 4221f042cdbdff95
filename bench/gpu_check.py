"""Check on a real GPU what the tests only simulate; exit with 1 if a check fails.

`python bench/gpu_check.py`, or as the first part of bench/gpu.sh. Each check prints a line. A
failed check does not stop the others.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

import latentcache
from encoder import draw_images, make_kl_f8
from latentcache.metrics import drift_db
from latentcache.vae.encoder import (
    MIN_DRIFT_DB,
    PRECISION_DTYPES,
    Encoded,
    LatentEncoder,
    require_fp32,
    resolve_precision,
)
from latentcache.vae.fast import FastEncoder, fastest_encode
from latentcache.vae.model import KLAutoencoder


@dataclass(frozen=True, slots=True)
class Vaes:
    """The demo VAE with trained weights, and one of the published size with random weights."""

    demo: KLAutoencoder
    large: KLAutoencoder


def noise(num: int, height_px: int, width_px: int) -> Tensor:
    return torch.randint(0, 256, (num, 3, height_px, width_px), dtype=torch.uint8)


def triton_is_used(vaes: Vaes) -> str:
    assert isinstance(fastest_encode(vaes.demo, torch.float16), FastEncoder)
    return "the fused path"


def the_fast_path_is_the_reference_in_fp32(vaes: Vaes) -> str:
    figures = []
    for vae, size in (
        (vaes.demo, (3, 192, 320)),
        (vaes.large, (1, 256, 256)),
        (vaes.large, (2, 320, 192)),
        (vaes.large, (1, 768, 512)),
    ):
        images = noise(*size).cuda()
        fast = fastest_encode(vae, torch.float32)(images)
        figures.append(drift_db(fast, vae.encode(images)))
    assert min(figures) > 80, figures
    return f"at least {min(figures):.0f} dB"


def in_16_bits_it_drifts_no_further_than_the_reference(vaes: Vaes) -> str:
    lines = []
    for name, vae in (("demo", vaes.demo), ("kl-f8, random", vaes.large)):
        images = draw_images(4, 256, "cuda")
        exact = vae.encode(images)
        for precision in ("fp16", "bf16"):
            dtype = PRECISION_DTYPES[precision]
            fast_db = drift_db(fastest_encode(vae, dtype)(images), exact)
            eager_db = drift_db(copy.deepcopy(vae).to(dtype).encode(images), exact)
            lines.append(f"{name} {precision} {fast_db:.1f} dB, eager {eager_db:.1f}")
            assert fast_db > eager_db - 1, lines
    return "; ".join(lines)


def attention_at_1024_px_is_right(vaes: Vaes) -> str:
    images = noise(1, 1024, 1024).cuda()
    fast = fastest_encode(vaes.large, torch.float16)(images)
    found_db = drift_db(fast, vaes.large.encode(images))
    assert found_db > 40, found_db
    return f"{found_db:.1f} dB from fp32"


def batches_in_flight_give_what_one_at_a_time_gives(vaes: Vaes) -> str:
    """Compare concurrent batches of varying size, collected on another thread, with single ones."""
    sizes = [1 + index * 7 % 16 for index in range(60)]
    batches = [noise(size, 256, 192) for size in sizes]
    encoder = LatentEncoder(vaes.large, "fp16", batch_size=8)
    expected = [encoder.encode(batch).moments for batch in batches]
    torch.cuda.synchronize()
    began = time.perf_counter()
    with ThreadPoolExecutor(1) as starter, ThreadPoolExecutor(1) as collector:
        started = [starter.submit(encoder.start, batch) for batch in batches]
        collected = [collector.submit(_collect, future) for future in started]
        figures = [future.result() for future in collected]
    elapsed_s = time.perf_counter() - began
    worst = min(drift_db(f.moments, e) for f, e in zip(figures, expected, strict=True))
    assert worst > 60, worst
    busy = sum(f.busy_s for f in figures) / elapsed_s
    same = all(torch.equal(f.moments, e) for f, e in zip(figures, expected, strict=True))
    return f"{'the same bits' if same else f'{worst:.0f} dB'}; the GPU was busy {busy:.0%}"


def _collect(started: Future[Callable[[], Encoded]]) -> Encoded:
    return started.result()()


def starting_a_batch_waits_for_nothing(vaes: Vaes) -> str:
    encoder = LatentEncoder(vaes.large, "fp16", batch_size=8)
    images = noise(8, 256, 256)
    encoder.encode(images)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        began = time.perf_counter()
        collect = encoder.start(images)
        started_s = time.perf_counter() - began
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return f"started in {1e3 * started_s:.1f} ms, done after {1e3 * collect().busy_s:.1f} ms"


def too_little_memory_halves_the_batch(vaes: Vaes) -> str:
    images = noise(64, 512, 512)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    memory = (torch.cuda.memory_reserved() + 3 * 2**30) / total
    torch.cuda.set_per_process_memory_fraction(memory)
    try:
        encoder = LatentEncoder(vaes.large, "fp16", batch_size=64)
        first = encoder.start(images)  # the next batch starts while this one is in progress
        moments = torch.cat([first().moments, encoder.encode(images).moments])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    size = encoder.batch_size(512, 512)
    assert 1 <= size < 64, size
    expected = LatentEncoder(vaes.large, "fp16", batch_size=16).encode(images).moments
    found_db = min(drift_db(half, expected) for half in moments.chunk(2))
    assert found_db > 45, found_db  # another batch size has other kernels
    return f"64 became {size}, {found_db:.0f} dB"


def what_overflows_is_encoded_again_in_fp32(vaes: Vaes) -> str:
    vae = copy.deepcopy(vaes.demo)
    vae.encoder.get_parameter("conv_in.weight").data *= 1e6
    images = noise(3, 128, 128)
    encoded = LatentEncoder(vae, "fp16", batch_size=4).encode(images)
    assert (encoded.num_in_fp32, encoded.bad) == (3, ()), encoded.num_in_fp32
    torch.testing.assert_close(encoded.moments, vae.encode(images.cuda()).cpu())
    return "3 of 3"


def precision_auto(vaes: Vaes) -> str:
    images = list(draw_images(8, 256, "cpu"))
    figures = {"demo": resolve_precision(vaes.demo, images)}
    figures["kl-f8, random"] = resolve_precision(vaes.large, images)
    assert figures["demo"] == "fp16", f"{figures}, with {MIN_DRIFT_DB} dB asked for"
    return str(figures)


def batch_size_auto(vaes: Vaes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        lines = []
        for side_px in (256, 512, 1024):
            began = time.perf_counter()
            size = LatentEncoder(vaes.large, "fp16").batch_size(side_px, side_px)
            took_s = time.perf_counter() - began
            began = time.perf_counter()
            assert LatentEncoder(vaes.large, "fp16").batch_size(side_px, side_px) == size
            assert time.perf_counter() - began < 1
            lines.append(f"{side_px} px: {size} ({took_s:.1f} s)")
        del os.environ["XDG_CACHE_HOME"]
    return ", ".join(lines)


CHECKS: tuple[Callable[[Vaes], str], ...] = (
    triton_is_used,
    the_fast_path_is_the_reference_in_fp32,
    in_16_bits_it_drifts_no_further_than_the_reference,
    attention_at_1024_px_is_right,
    batches_in_flight_give_what_one_at_a_time_gives,
    starting_a_batch_waits_for_nothing,
    too_little_memory_halves_the_batch,
    what_overflows_is_encoded_again_in_fp32,
    precision_auto,
    batch_size_auto,
)


def main() -> int:
    if not torch.cuda.is_available():
        print("no GPU here")
        return 1
    require_fp32()
    demo = latentcache.load_vae("demo", device="cuda", decoder=False)
    vaes = Vaes(demo, make_kl_f8("cuda"))
    num_failed = 0
    for check in CHECKS:
        try:
            with torch.inference_mode():
                said = check(vaes)
        except Exception:  # noqa: BLE001  (the other checks have their turn)
            traceback.print_exc()
            said, num_failed = "FAILED", num_failed + 1
        print(f"{check.__name__.replace('_', ' ')}: {said}", flush=True)
        torch.cuda.empty_cache()
    return int(num_failed > 0)


if __name__ == "__main__":
    sys.exit(main())
