"""Encode uint8 batches: precision, batch size, streams, memory back-off, checks for non-finite."""

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

# A drift from fp32 without effect on training. Storing latents in float16 has about 70 dB.
MIN_DRIFT_DB = 55.0

# The pixels that a CPU thread encodes at once with `batch_size: auto`: one image of 256 px, because
# larger batches do not fit into the cache (bench/results/encoder.json).
_CPU_BATCH_PIXELS = 256 * 256

# The memory limit of the images that a CPU encodes at once, and the maps of the first block's width
# that each image needs.
_CPU_BYTES = 2**30
_MAPS_AT_ONCE = 4

# The batches of a GPU in progress: one is encoded, one is copied to the GPU, and one waits.
_MAX_IN_FLIGHT = 3


def require_fp32() -> None:
    """Disable TF32 for float32 convolutions, because it has ten bits of mantissa, like float16."""
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]


def prepare_device(device: str) -> None:
    """Disable TF32; raise `ClusterError` if the device is a GPU that torch cannot use."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ClusterError(
            f"a worker has a GPU, but its torch {torch.__version__} cannot use it: install a CUDA "
            "build there, or set compute.num_gpus to 0"
        )
    require_fp32()


@dataclass(frozen=True, slots=True)
class Encoded:
    """The moments of one batch: float32 [B, 2C, H, W] on the CPU, mean then log-variance.

    `num_in_fp32` latents were encoded again in fp32. Those in `bad` (indices) are still not finite.
    `busy_s` is the time of the device, and `start_s` that of `start`.
    """

    moments: Tensor
    num_in_fp32: int
    bad: tuple[int, ...]
    busy_s: float = 0.0
    start_s: float = 0.0


class LatentEncoder:
    """An encoder of batches on one device.

    On a GPU, one thread starts batches and another collects them. `start` waits only for the batch
    before the last two. On a CPU, several threads may start batches at once, and each thread
    encodes the batch that it starts.

    Args:
        vae, precision: the VAE in fp32 on its device; `fp32`, `fp16` or `bf16`.
        batch_size: the images of a batch; None chooses by bucket and device.
        encode: encodes a batch on the device in `precision`; None uses `fastest_encode`.
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
        """The version of triton that encodes, if any; see `triton_version`."""
        return triton_version(self._device)

    def num_threads(self, num_pixels: int) -> int:
        """Return how many threads should start batches of images of up to `num_pixels` at once.

        The caller should divide torch's own number of threads by it (`torch.set_num_threads`).
        """
        if self._gpu:
            return 1
        num_pixels = max(num_pixels * (self._batch_size or 1), _CPU_BATCH_PIXELS)
        width = self._reference.architecture.block_out_channels[0]
        num_bytes = num_pixels * width * _MAPS_AT_ONCE * 4
        return max(1, min(torch.get_num_threads(), _CPU_BYTES // num_bytes))

    def batch_size(self, width_px: int, height_px: int) -> int:
        """Return the batch size of a bucket. On a GPU, the first call may measure several sizes.

        Args:
            width_px, height_px: the size of the bucket.
        """
        bucket = (width_px, height_px)
        with self._choosing:
            if bucket not in self._limits:
                self._limits[bucket] = self._batch_size or self._choose_batch_size(*bucket)
            return self._limits[bucket]

    def encode(self, images: Tensor) -> Encoded:
        """Encode uint8 [B, 3, H, W] from the CPU. Errors: see `start`."""
        return self.start(images)()

    def start(self, images: Tensor) -> Callable[[], Encoded]:
        """Start to encode uint8 [B, 3, H, W] from the CPU. The images must not change afterwards.

        The result is a function that any thread may call, once, to wait for the moments. If the
        device runs out of memory, the batch size of this bucket is halved permanently.

        Raises:
            torch.OutOfMemoryError: a single image does not fit.
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
            # Outside the handler, because the traceback holds references to the tensors. If batches
            # were in progress, their memory is free now, and the same size is tried again.
            if not (self._gpu and self._gpu.finish()):
                if full == 1:
                    raise problem
                self._limits[width_px, height_px] = full // 2
            torch.cuda.empty_cache()

    def _start_batch(self, images: Tensor, full: int) -> _Part:
        if self._gpu:
            return self._gpu.start(self._encode, images, full)
        began = time.perf_counter()
        result = self._encode(images), time.perf_counter() - began
        return lambda: result

    @torch.inference_mode()
    def _collect(self, images: Tensor, parts: Sequence[_Part], start_s: float) -> Encoded:
        results = [part() for part in parts]
        moments = torch.cat([moments for moments, _ in results])
        busy_s = sum(busy_s for _, busy_s in results)
        again = (~moments.isfinite().all(dim=(1, 2, 3))).nonzero().flatten().tolist()
        for index in again:
            moments[index] = self._encode_in_fp32(images[index : index + 1])[0]
        bad = tuple(index for index in again if not moments[index].isfinite().all())
        return Encoded(moments, len(again) - len(bad), bad, busy_s, start_s)

    def _encode_in_fp32(self, images: Tensor) -> Tensor:
        """Encode with the reference, on the stream of the batches and after those in progress."""
        try:
            return self._reference.encode(images.to(self._device)).cpu()
        except torch.OutOfMemoryError:
            if not self._gpu:
                raise
        self._gpu.finish()
        torch.cuda.empty_cache()
        return self._reference.encode(images.to(self._device)).cpu()

    def _choose_batch_size(self, width_px: int, height_px: int) -> int:
        if not self._gpu:
            return max(1, _CPU_BATCH_PIXELS // (width_px * height_px))
        device = torch.cuda.get_device_properties(self._device)
        gib = round(device.total_memory / 2**30)
        gpu = f"{device.name} with {gib} GiB, torch {torch.__version__}"
        fields = self._reference.architecture.encoder_fields
        encoder = f"{gpu}, {self._precision}, {json.dumps(fields, sort_keys=True)}"
        measure = partial(self._gpu.measure, self._encode, width_px, height_px)
        return remembered_batch_size(encoder, width_px, height_px, measure)


class _Gpu:
    """The streams of a GPU, and its batches in progress.

    Pixels are copied to the device on a second stream, and moments back on a third. Compute runs on
    the current stream, which is the same for all threads of the process and for QA.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copy_in = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._copy_out = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._in_flight: deque[torch.cuda.Event] = deque()
        self._lock = threading.RLock()

    def start(self, encode: Encode, images: Tensor, full: int) -> _Part:
        """Enqueue one batch, and return a function that waits for its moments.

        Tensors may be freed before the GPU has used them. torch reuses pinned memory only after the
        copies from and to it, and a GPU's memory only after the work enqueued before on its own
        stream and on those that it was recorded on.

        Args:
            encode, images, full: uint8 [B, 3, H, W] on the CPU, which are padded to `full` images.
        """
        num_images = len(images)
        with self._lock, torch.cuda.device(self._device), _autotuned():
            while len(self._in_flight) >= _MAX_IN_FLIGHT:
                self._in_flight.popleft().synchronize()
            compute = torch.cuda.current_stream()
            pinned = torch.empty((full, *images.shape[1:]), dtype=torch.uint8, pin_memory=True)
            pinned[:num_images] = images
            # One shape for each bucket, so that cuDNN selects its kernels once.
            pinned[num_images:] = images[-1]
            with torch.cuda.stream(self._copy_in):
                pixels = pinned.to(self._device, non_blocking=True)
            compute.wait_stream(self._copy_in)
            pixels.record_stream(compute)
            began, moments, ended = _timed(encode, pixels)
            self._copy_out.wait_event(ended)
            result = torch.empty(moments.shape, dtype=moments.dtype, pin_memory=True)
            with torch.cuda.stream(self._copy_out):
                result.copy_(moments, non_blocking=True)
            moments.record_stream(self._copy_out)
            done = _event(blocking=True)  # a waiting thread sleeps and does not spin
            done.record(self._copy_out)
            self._in_flight.append(done)

        def wait() -> tuple[Tensor, float]:
            done.synchronize()
            return result[:num_images], began.elapsed_time(ended) / 1e3

        return wait

    def finish(self) -> bool:
        """Wait for the batches in progress, and return whether there were any."""
        with self._lock:
            had_any = bool(self._in_flight)
            while self._in_flight:
                self._in_flight.popleft().synchronize()
        return had_any

    @torch.inference_mode()
    def measure(self, encode: Encode, width_px: int, height_px: int, batch_size: int) -> float:
        """Return the rate of encoding noise in images/s. Args: see `find_batch_size`, `start`."""
        shape = (batch_size, 3, height_px, width_px)
        with self._lock, torch.cuda.device(self._device), _autotuned():
            self.finish()
            torch.cuda.empty_cache()
            images = torch.randint(0, 256, shape, dtype=torch.uint8, device=self._device)
            seconds: list[float] = []
            for _ in range(5):
                began, _, ended = _timed(encode, images)
                ended.synchronize()
                seconds.append(began.elapsed_time(ended) / 1e3)
        return batch_size / min(seconds[2:])


def _event(*, enable_timing: bool = False, blocking: bool = False) -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing, blocking)  # type: ignore[no-untyped-call]


def _timed(encode: Encode, pixels: Tensor) -> tuple[torch.cuda.Event, Tensor, torch.cuda.Event]:
    """Encode between two events of the current stream."""
    began, ended = _event(enable_timing=True), _event(enable_timing=True)
    began.record()
    moments = encode(pixels)
    ended.record()
    return began, moments, ended


@contextmanager
def _autotuned() -> Iterator[None]:
    """Let cuDNN benchmark kernels for new shapes; only the shapes of batches recur often enough."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def draw_latents(
    moments: torch.Tensor, posterior: str, unit_id: str, keys: Sequence[str]
) -> torch.Tensor:
    """Return the latents to store, float32 [B, C, H, W].

    Args:
        moments, unit_id, keys: float32 [B, 2C, H, W], mean then log-variance, of B rows.
        posterior: `mean` returns the first half of the channels, `moments` all of them. `sample`
            draws from N(mean, exp(logvar)) with Philox noise from the SHA-256 of (unit, key).
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
    """Return the fastest precision whose drift from fp32 on real images is at least `MIN_DRIFT_DB`.

    On a CPU the result is always fp32: float16 is slower there, and bfloat16 never reaches 55 dB.

    Args:
        vae, images: the VAE in fp32 on its device; uint8 [3, H, W] each; if empty, fp32.
    """
    if vae.device.type != "cuda" or not images:
        return "fp32"
    channels = vae.architecture.latent_channels
    # float16 is as fast as bfloat16 and has three more bits of precision, but can overflow.
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
