"""From uint8 batches to latents: precision, batch size, streams, memory back-off, finite checks."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from latentcache.errors import ClusterError
from latentcache.metrics import drift_db
from latentcache.vae.batch_search import remembered_batch_size
from latentcache.vae.fast import Encode, fastest_encode, triton_version
from latentcache.vae.model import KLAutoencoder

_Part = Callable[[], tuple[Tensor, float]]  # waits for moments and the device's seconds

PRECISION_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Storing float16 alone costs about 70 dB; an encode this close to fp32 costs training nothing.
MIN_DRIFT_DB = 55.0

# Pixels that a CPU thread encodes at once with `batch_size: auto`: one image of 256 px. On two
# cores with the demo VAE, two threads with an image each made 77 images/s, and torch's own two
# threads 67 with one image, 73 with two, 60 with four and 48 with eight: larger batches leave the
# cache (bench/results/encoder.json).
_CPU_BATCH_PIXELS = 256 * 256

# What the images that a CPU encodes at once may take together, at four maps of the first block's
# width each: all threads of a small actor have one, until the images or the network are large.
_CPU_BYTES = 2**30
_MAPS_AT_ONCE = 4

# Batches that a GPU has in hand: one that it works on, one that is copied to it, one that waits.
_MAX_IN_FLIGHT = 3


def require_fp32() -> None:
    """Make fp32 mean fp32 in this process.

    By default cuDNN computes convolutions of float32 in TF32, whose ten bits are those of float16:
    no reference for it, and no way out where float16 fails.
    """
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]


def prepare_device(device: str) -> None:
    """Make sure that a worker can use its device, and that fp32 means fp32 there.

    Raises:
        ClusterError: the device is a GPU that torch cannot use.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ClusterError(
            f"a worker has a GPU, but its torch {torch.__version__} cannot use it: install a CUDA "
            "build there, or set compute.num_gpus to 0"
        )
    require_fp32()


@dataclass(frozen=True, slots=True)
class Encoded:
    """Moments of one batch: float32 [B, 2C, H, W] on the CPU, mean then log-variance.

    `num_in_fp32` latents were not finite and were encoded again in fp32; those listed in `bad` are
    still not finite. The device worked on it for `busy_s`, and `start` took `start_s`, which are
    the same on a CPU.
    """

    moments: Tensor
    num_in_fp32: int
    bad: tuple[int, ...]
    busy_s: float = 0.0
    start_s: float = 0.0


class LatentEncoder:
    """Encodes batches on one device.

    On a GPU one thread starts batches and another collects them. Pixels go from pinned memory to
    the device on a stream of their own, moments come back on a third, and nothing waits but
    `start`, for the batch before the last two, and who collects. On a CPU several threads may start
    batches at once, and a batch is encoded by the thread that starts it.

    Args:
        vae: in fp32 on its device; its decoder is not used.
        precision: `fp32`, `fp16` or `bf16`.
        batch_size: images at once, or None to choose by bucket and device.
        encode: encodes a batch on the device, in that precision; None takes the fastest way.
    """

    def __init__(
        self,
        vae: KLAutoencoder,
        precision: str,
        batch_size: int | None = None,
        *,
        encode: Encode | None = None,
    ) -> None:
        self._reference = vae
        self._precision = precision
        self._encode = encode or fastest_encode(vae, PRECISION_DTYPES[precision])
        self._device = vae.device
        self._batch_size = batch_size
        self._limits: dict[tuple[int, int], int] = {}
        self._choosing = threading.Lock()
        self._gpu = _Gpu(self._device) if self._device.type == "cuda" else None

    @property
    def triton(self) -> str | None:
        """Which triton encodes here, if any; see `triton_version`."""
        return triton_version(self._device)

    def num_threads(self, num_pixels: int) -> int:
        """How many threads should start batches at once, of images of so many pixels at most.

        On a CPU these are as many as torch has, if there is memory enough; torch itself should then
        have that many times fewer (`torch.set_num_threads`).
        """
        if self._gpu:
            return 1
        num_pixels = max(num_pixels * (self._batch_size or 1), _CPU_BATCH_PIXELS)
        width = self._reference.architecture.block_out_channels[0]
        num_bytes = num_pixels * width * _MAPS_AT_ONCE * 4
        return max(1, min(torch.get_num_threads(), _CPU_BYTES // num_bytes))

    def batch_size(self, width_px: int, height_px: int) -> int:
        """How many images of that bucket to bring at once; a GPU may have to try some sizes."""
        bucket = (width_px, height_px)
        with self._choosing:
            if bucket not in self._limits:
                self._limits[bucket] = self._batch_size or self._auto_batch_size(*bucket)
            return self._limits[bucket]

    def encode(self, images: Tensor) -> Encoded:
        """Encode uint8 [B, 3, H, W] from the CPU; what `start` says of errors holds here too."""
        return self.start(images)()

    def start(self, images: Tensor) -> Callable[[], Encoded]:
        """Begin to encode uint8 [B, 3, H, W] from the CPU, which must not change from then on.

        Running out of GPU memory halves the batch size of this bucket from then on.

        Returns:
            What waits for the moments and gives them, to be called once, by any thread.

        Raises:
            torch.OutOfMemoryError: not even one image fits.
        """
        began = time.perf_counter()
        with torch.inference_mode():
            parts = list(self._start_in_batches(images))
        return partial(self._collect, images, parts, time.perf_counter() - began)

    def _start_in_batches(self, images: Tensor) -> Iterator[_Part]:
        height_px, width_px = images.shape[2:]
        while len(images):
            full = self.batch_size(width_px, height_px)
            try:
                yield self._start_batch(images[:full], full)
                images = images[full:]
                continue
            except torch.OutOfMemoryError as error:
                problem = error.with_traceback(None)
            # Out here, where the traceback no longer holds on to the tensors that it met.
            if not (self._gpu and self._gpu.finish()):  # else again, with what those batches held
                if full == 1:
                    raise problem
                self._limits[width_px, height_px] = full // 2
            torch.cuda.empty_cache()

    def _start_batch(self, images: Tensor, full: int) -> _Part:
        if self._gpu:
            return self._gpu.start(self._encode, images, full)
        began = time.perf_counter()
        moments = self._encode(images)
        busy_s = time.perf_counter() - began
        return lambda: (moments, busy_s)

    @torch.inference_mode()
    def _collect(self, images: Tensor, parts: Sequence[_Part], start_s: float) -> Encoded:
        found = [part() for part in parts]
        moments = torch.cat([moments for moments, _ in found])
        busy_s = sum(busy_s for _, busy_s in found)
        again = (~moments.isfinite().all(dim=(1, 2, 3))).nonzero().flatten().tolist()
        for index in again:
            moments[index] = self._encode_in_fp32(images[index : index + 1])[0]
        bad = tuple(index for index in again if not moments[index].isfinite().all())
        return Encoded(moments, len(again) - len(bad), bad, busy_s, start_s)

    def _encode_in_fp32(self, images: Tensor) -> Tensor:
        """Encode by the reference, on the stream of the batches and after those in flight."""
        try:
            return self._reference.encode(images.to(self._device)).cpu()
        except torch.OutOfMemoryError:
            if not self._gpu:
                raise
        self._gpu.finish()
        torch.cuda.empty_cache()
        return self._reference.encode(images.to(self._device)).cpu()

    def _auto_batch_size(self, width_px: int, height_px: int) -> int:
        if not self._gpu:
            return max(1, _CPU_BATCH_PIXELS // (width_px * height_px))
        fields = self._reference.architecture.encoder_fields
        encoder = f"{self._gpu.name}, {self._precision}, {json.dumps(fields, sort_keys=True)}"
        measure = partial(self._gpu.measure, self._encode, width_px, height_px)
        return remembered_batch_size(encoder, width_px, height_px, measure)


class _Gpu:
    """A GPU's streams, and the batches that it has in hand.

    Compute runs on the current stream, which is the same for all threads of the process: what is
    not a batch, such as QA, takes its turn there, and memory goes round among them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copy_in = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._copy_out = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._in_flight: deque[torch.cuda.Event] = deque()
        self._lock = threading.RLock()

    @property
    def name(self) -> str:
        """What a batch size depends on besides the encoder."""
        device = torch.cuda.get_device_properties(self._device)
        gib = round(device.total_memory / 2**30)
        return f"{device.name} with {gib} GiB, torch {torch.__version__}"

    def start(self, encode: Encode, images: Tensor, full: int) -> _Part:
        """Enqueue one batch, padded to `full` images, and give what waits for its moments.

        Every tensor is freed before it has been used. That is sound: pinned memory is given out
        again only after the copies from and to it, and a GPU's memory only after what was enqueued
        before on its own stream, and on those that it was recorded on.
        """
        num_images = len(images)
        with self._lock, torch.cuda.device(self._device), _autotuned():
            while len(self._in_flight) >= _MAX_IN_FLIGHT:
                self._in_flight.popleft().synchronize()
            compute = torch.cuda.current_stream()
            pinned = torch.empty((full, *images.shape[1:]), dtype=torch.uint8, pin_memory=True)
            pinned[:num_images] = images
            # One shape per bucket: cuDNN picks its kernels once, and a tail runs like any batch.
            pinned[num_images:] = images[-1]
            with torch.cuda.stream(self._copy_in):
                pixels = pinned.to(self._device, non_blocking=True)
            compute.wait_stream(self._copy_in)
            pixels.record_stream(compute)
            began, ended = _event(enable_timing=True), _event(enable_timing=True)
            began.record()
            moments = encode(pixels)
            ended.record()
            self._copy_out.wait_event(ended)
            found = torch.empty(moments.shape, dtype=moments.dtype, pin_memory=True)
            with torch.cuda.stream(self._copy_out):
                found.copy_(moments, non_blocking=True)
            moments.record_stream(self._copy_out)
            done = _event(blocking=True)  # who waits sleeps, and does not spin
            done.record(self._copy_out)
            self._in_flight.append(done)

        def wait() -> tuple[Tensor, float]:
            done.synchronize()
            return found[:num_images], began.elapsed_time(ended) / 1e3

        return wait

    def finish(self) -> bool:
        """Wait for the batches in hand; says whether there were any."""
        with self._lock:
            num_waited = len(self._in_flight)
            while self._in_flight:
                self._in_flight.popleft().synchronize()
        return num_waited > 0

    @torch.inference_mode()
    def measure(self, encode: Encode, width_px: int, height_px: int, batch_size: int) -> float:
        """Give images/s of noise, when nothing else runs; the first rounds only choose kernels."""
        shape = (batch_size, 3, height_px, width_px)
        with self._lock, torch.cuda.device(self._device), _autotuned():
            self.finish()
            torch.cuda.empty_cache()
            images = torch.randint(0, 256, shape, dtype=torch.uint8, device=self._device)
            seconds: list[float] = []
            for _ in range(5):
                began, ended = _event(enable_timing=True), _event(enable_timing=True)
                began.record()
                encode(images)
                ended.record()
                ended.synchronize()
                seconds.append(began.elapsed_time(ended) / 1e3)
        return batch_size / min(seconds[2:])


def _event(*, enable_timing: bool = False, blocking: bool = False) -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing, blocking)  # type: ignore[no-untyped-call]


@contextmanager
def _autotuned() -> Iterator[None]:
    """Have cuDNN try its kernels at each new shape; only the shapes of batches are worth that."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def draw_latents(
    moments: torch.Tensor, posterior: str, unit_id: str, keys: Sequence[str]
) -> torch.Tensor:
    """Take what is stored from moments, float32 [B, 2C, H, W].

    `mean` is the first half of the channels, `moments` all of them, and `sample` is drawn from
    N(mean, exp(logvar)) with noise that depends on (unit, key) alone: Philox, keyed by their
    SHA-256, so that every attempt draws the same.

    Returns:
        float32 [B, C, H, W], or [B, 2C, H, W] for `moments`.
    """
    if posterior == "moments":
        return moments
    mean, logvar = moments.chunk(2, dim=1)
    if posterior == "mean":
        return mean
    noise = torch.empty_like(mean)
    for index, key in enumerate(keys):
        digest = hashlib.sha256(f"{unit_id}\0{key}".encode()).digest()
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
        drawn = generator.standard_normal(tuple(mean.shape[1:]), dtype=np.float32)
        noise[index] = torch.from_numpy(drawn)
    return mean + torch.exp(0.5 * logvar) * noise


@torch.inference_mode()
def resolve_precision(vae: KLAutoencoder, images: Sequence[Tensor]) -> str:
    """Choose the fastest precision that stays `MIN_DRIFT_DB` from fp32 on real images.

    A CPU is told fp32 without a look. Its bfloat16 would be twice as fast, but has eight bits: it
    stays 46 dB from fp32 with the demo VAE and 31 dB with a random kl-f8, and can never reach 55.
    Its float16 would reach them, and is slower than fp32.

    Args:
        vae: in fp32 on its device.
        images: uint8 [3, H, W] each; none at all gives fp32.
    """
    if vae.device.type != "cuda" or not images:
        return "fp32"
    channels = vae.architecture.latent_channels
    # float16 is as fast as bfloat16 and has three more bits, but can overflow.
    for precision in ("fp16", "bf16"):
        if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            continue
        encode = fastest_encode(vae, PRECISION_DTYPES[precision])
        batches = [image[None].to(vae.device) for image in images]
        drifts = [
            drift_db(encode(pixels)[:, :channels], vae.encode(pixels)[:, :channels])
            for pixels in batches
        ]
        if min(drifts) >= MIN_DRIFT_DB:
            return precision
    return "fp32"
