"""Choose rows of a unit, decode their stored latents and compare them with the encoded crops."""

from __future__ import annotations

import hashlib
import heapq
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from latentcache.dataset.bucket import Bucket
from latentcache.dataset.contract import Contract
from latentcache.dataset.quantization import is_finite, to_values
from latentcache.dataset.shards import BucketWriter, read_latents, tensor_bytes
from latentcache.errors import ConfigError
from latentcache.image_files import read_png, write_png
from latentcache.metrics import MAX_DB, MIN_DB, psnr_db, ssim
from latentcache.networks import Distance, load_lpips
from latentcache.qa.qa_files import QaRow
from latentcache.storage_options import StorageOptions
from latentcache.vae.encoder import draw_latents
from latentcache.vae.model import KLAutoencoder, require_agreement, require_family, to_uint8
from latentcache.vae.weights import encoder_fingerprint, load_vae

# Decoding takes several times the memory of encoding, so a batch has few images.
_BATCH_PIXELS = 4 * 256 * 256

# Rows that a run evaluates in one job. Between two jobs, it may use the encoder's thread to encode.
_ROWS_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class QaModels:
    """The checkpoint whose decoder is used, and the (URL, SHA-256) of the LPIPS network.

    Without a decoder, the dataset's VAE decodes. Without the network, LPIPS is not measured.
    """

    decoder: str | None = None
    lpips: tuple[str, str] | None = None
    decoder_storage: StorageOptions = StorageOptions()
    lpips_storage: StorageOptions = StorageOptions()


class QaEvaluator:
    """The evaluator of one dataset's rows. All modules are in fp32 on the device of the encoder.

    `encoder` is the dataset's VAE. It needs a decoder only if `models` names none. `agreement_db`
    is the agreement of another decoder's own encoder with it; None if it was not compared.

    Raises:
        CheckpointError, ConfigError: the decoder or the LPIPS network cannot be used.
    """

    def __init__(
        self, contract: Contract, encoder: KLAutoencoder, models: QaModels = QaModels()
    ) -> None:
        self._num_channels, self._terms = contract.vae.latent_channels, contract.latents
        self._encoder = self._decoder = encoder
        self._lpips: Distance | None = None
        self._is_trusted = True
        self.agreement_db: float | None = None
        device, options = encoder.device, models.decoder_storage
        if models.decoder:
            self._decoder = load_vae(models.decoder, device=device, options=options)
            require_family(self._decoder, "the decoder", contract.vae)
            fingerprint = encoder_fingerprint(self._decoder)
            self._is_trusted = fingerprint == contract.vae.encoder_fingerprint
        if models.lpips:
            self._lpips = load_lpips(*models.lpips, models.lpips_storage, device)

    @torch.inference_mode()
    def evaluate(
        self,
        unit: str,
        bucket: str,
        crops: Mapping[str, bytes],
        stored: Mapping[str, Tensor],
        signal: float,
    ) -> list[QaRow]:
        """Measure rows of one bucket of one unit, and return those that `stored` has.

        Args:
            unit, bucket: the unit's id and the bucket's name.
            crops: the encoded pixels as PNG, by key; another size raises `ValueError`.
            stored: the stored tensors by key: [C, h, w] in the stored dtype; [2C, h, w] if moments.
            signal: the variance of the dataset's latents, averaged over its C channels.

        Raises:
            ConfigError: the decoder's own encoder differs from the dataset's and does not agree.
        """
        size = Bucket.parse(bucket)
        batch = max(1, _BATCH_PIXELS // size.num_pixels)
        measure = partial(self._measure, unit, size, crops, stored, signal)
        keys = [key for key in crops if key in stored]
        rows: list[QaRow] = []
        for first in range(0, len(keys), batch):
            some = keys[first : first + batch]
            try:
                rows += measure(some)
                continue
            except torch.OutOfMemoryError:
                pass
            # Outside the handler, because the error holds references to the tensors.
            torch.cuda.empty_cache()
            try:
                rows += [row for key in some for row in measure([key])]
            except torch.OutOfMemoryError as error:
                raise ConfigError(
                    f"decoding {bucket} for QA does not fit into the GPU's memory beside encoding: "
                    "lower compute.batch_size, or run `latentcache qa` later"
                ) from error
        return rows

    def _measure(
        self,
        unit: str,
        size: Bucket,
        crops: Mapping[str, bytes],
        stored_by_key: Mapping[str, Tensor],
        signal: float,
        keys: Sequence[str],
    ) -> list[QaRow]:
        channels = slice(self._num_channels)  # the first half of moments is the mean
        images = [crops[key] for key in keys]
        pixels = torch.stack([read_png(image, size) for image in images]).to(self._decoder.device)
        stored = torch.stack([stored_by_key[key] for key in keys])
        latents = to_values(stored, self._terms)
        moments = self._encoder.encode(pixels)
        if not self._is_trusted:
            own = self._decoder.encode(pixels)[:, channels]
            self.agreement_db = require_agreement(own, moments[:, channels], "the decoder")
            self._is_trusted = True
        reference = draw_latents(moments.cpu(), self._terms.posterior, unit, keys)
        finite = is_finite(stored).all(dim=(1, 2, 3))
        means = latents[:, channels]
        decoded = self._decode(means.nan_to_num(posinf=0.0, neginf=0.0))
        psnrs = torch.where(finite, _limited(psnr_db(decoded, pixels).cpu()), MIN_DB)
        lpips: list[float | None] = [None] * len(keys)
        costs = lpips
        if self._lpips:
            lpips = self._lpips(decoded, pixels).tolist()
        if self._terms.quantization:
            best = _limited(psnr_db(self._decode(reference[:, channels]), pixels).cpu())
            costs = torch.where(finite, best - psnrs, 0.0).tolist()
        drifts = _drifts_db(latents, reference, self._num_channels, signal)
        columns = (
            *(psnrs.tolist(), ssim(decoded, pixels).tolist(), lpips, drifts.tolist(), costs),
            *(images, map(write_png, decoded.cpu()), map(tensor_bytes, means)),
            [means.shape[1:]] * len(keys),
        )
        return [QaRow(key, size.name, *values) for key, *values in zip(keys, *columns, strict=True)]

    def _decode(self, latents: Tensor) -> Tensor:
        return to_uint8(self._decoder.decode(latents.to(self._decoder.device)))


def _drifts_db(latents: Tensor, reference: Tensor, channels: int, signal: float) -> Tensor:
    """Return each row's drift in dB: signal over the mean squared error of the training samples.

    From moments, training draws `mean + exp(logvar / 2) * n` with a standard normal n. The expected
    squared error is therefore that of the mean plus that of the standard deviation.
    """
    latents, reference = latents.double(), reference.double()
    error = (latents[:, :channels] - reference[:, :channels]).square()
    if latents.shape[1] > channels:
        std, reference_std = ((0.5 * z[:, channels:]).exp() for z in (latents, reference))
        error = error + (std - reference_std).square()
    means = error.mean(dim=(1, 2, 3))
    return _limited(torch.where(means == 0, torch.inf, 10 * torch.log10(signal / means)))


def _limited(decibels: Tensor) -> Tensor:
    """Clamp decibels to the limits of stored measures; NaN becomes the lower limit."""
    return decibels.nan_to_num(nan=MIN_DB).clamp(MIN_DB, MAX_DB)


@dataclass(slots=True)
class QaSample:
    """The QA sample of one unit, with its crops as PNG files in `folder`.

    Every row draws a number in [0, 1) from (seed, unit, key). Rows below the fraction are kept, and
    in a bucket with fewer rows than `min_rows` those with the next lowest numbers.
    """

    fraction: float
    seed: int
    min_rows: Mapping[str, int]  # by bucket
    unit_id: str
    folder: Path
    _num_offered: int = 0
    # By bucket, a heap of (minus the draw, index, key).
    _kept: dict[str, list[tuple[float, int, str]]] = field(
        default_factory=lambda: defaultdict(list)
    )

    def offer(self, bucket: str, key: str, pixels: torch.Tensor) -> None:
        """Draw a number for a row that will be encoded, and keep its crop if the row is kept.

        Args:
            bucket, key, pixels: the bucket's name, the row's key, and its crop, uint8 [3, H, W].
        """
        index, kept = self._num_offered, self._kept[bucket]
        self._num_offered += 1
        text = f"{self.seed}\0{self.unit_id}\0{key}".encode()
        draw = int.from_bytes(hashlib.sha256(text).digest()[:8], "little") / 2**64
        heapq.heappush(kept, (-draw, index, key))
        highest = -kept[0][0]
        if highest >= self.fraction and len(kept) > self.min_rows.get(bucket, 0):
            _, dropped, _ = heapq.heappop(kept)
            if dropped == index:
                return
            self._crop(dropped).unlink()
        self._crop(index).write_bytes(write_png(pixels))

    def _crop(self, index: int) -> Path:
        return self.folder / f"qa-{index}.png"

    def evaluate(
        self,
        writers: Iterable[BucketWriter],
        evaluator: QaEvaluator,
        signal: float,
        submit: Callable[[Callable[[], list[QaRow]]], list[QaRow]],
    ) -> Iterator[QaRow]:
        """Evaluate the kept rows as stored in the closed files, in the order they were offered.

        Args:
            writers, evaluator, signal: one writer for each bucket, and see `QaEvaluator.evaluate`.
            submit: runs a job on the evaluator's thread and returns its result.
        """
        for writer in writers:
            bucket = writer.bucket.name
            kept = sorted(self._kept[bucket], key=lambda row: row[1])
            crops = {key: self._crop(index) for _, index, key in kept}
            with ExitStack() as stack:
                files = [stack.enter_context(path.open("rb")) for path in writer.paths]
                stored = read_latents(files, crops)
            keys = [key for key in crops if key in stored]  # the others became rejects
            for first in range(0, len(keys), _ROWS_AT_ONCE):
                some = {key: crops[key].read_bytes() for key in keys[first : first + _ROWS_AT_ONCE]}
                yield from submit(
                    partial(evaluator.evaluate, self.unit_id, bucket, some, stored, signal)
                )
