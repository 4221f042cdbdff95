"""A contact sheet: decoded rows of a dataset side by side in one picture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from latentcache.dataset.bucket import Bucket
from latentcache.dataset.reader import Dataset
from latentcache.errors import CheckpointError, ConfigError, DatasetError, StorageError
from latentcache.qa.access import find_checkpoint
from latentcache.storage.failures import named_local
from latentcache.storage_options import StorageOptions
from latentcache.vae.compatibility import require_family
from latentcache.vae.model import KLAutoencoder, to_uint8
from latentcache.vae.weights import encoder_fingerprint, load_vae

DEFAULT_NUM_ROWS = 24

_WIDTH_PX = 1440
_TILE_HEIGHT_PX = 200
_GAP_PX = 12
_FONT_PX = 13
_LABEL_PX = 2 * _FONT_PX + 10  # one line for the key and one for the bucket

_PAPER, _INK, _PALE_INK = "#ffffff", "#1b1c1e", "#6b6e74"


@dataclass(frozen=True, slots=True)
class Tile:
    """A decoded row."""

    image: Image.Image
    key: str


def load_decoder(
    dataset: Dataset, url: str | None = None, options: StorageOptions = StorageOptions()
) -> tuple[KLAutoencoder, list[str]]:
    """Load a VAE whose decoder accepts a dataset's latents.

    Args:
        dataset: the dataset.
        url: a checkpoint as for `load_vae`; None uses `demo` if that encoded the dataset.
        options: how to reach the checkpoint.

    Returns:
        The VAE, on the GPU if there is one, and notes for the user, one line each.

    Raises:
        ConfigError: there is no usable checkpoint, its latents have another shape, or only the
            dataset names it; see `qa/access.py`.
    """
    checkpoint = url or find_checkpoint(dataset)
    try:
        vae = load_vae(checkpoint, options=options)
    except (CheckpointError, StorageError) as error:
        raise ConfigError(f"no decoder at {checkpoint}: {error}") from error
    vae_contract = dataset.contract.vae
    require_family(vae, checkpoint, vae_contract)
    notes = []
    if encoder_fingerprint(vae) != vae_contract.encoder_fingerprint:
        notes.append(f"{checkpoint} has another encoder than the one that made these latents")
    return vae.to("cuda" if torch.cuda.is_available() else "cpu"), notes


def save_sheet(
    dataset: Dataset,
    vae: KLAutoencoder,
    target: Path,
    num_rows: int = DEFAULT_NUM_ROWS,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write a contact sheet of rows drawn at random.

    Args:
        dataset: the dataset.
        vae: the VAE that decodes; see `load_decoder`.
        target: a file with the suffix of PNG, JPEG or any other format that Pillow writes.
        num_rows: the number of rows; all rows if the dataset has fewer.
        seed: the seed of the random draw.
        progress: called with (rows decoded, rows in total).

    Returns:
        The number of rows in the picture.

    Raises:
        ConfigError: Pillow does not know the suffix of `target`.
        DatasetError: the dataset has no rows, or is damaged.
        StorageError: the file cannot be written.
    """
    if target.suffix.lower() not in Image.registered_extensions():
        raise ConfigError(f"cannot write a picture to {target}: name it .png or .jpg")
    num_rows = min(num_rows, len(dataset))
    if not num_rows:
        raise DatasetError(f"{dataset.url} has no rows to show")
    with named_local(target), target.open("ab"):
        pass  # a path that cannot be written is reported before the decoding
    drawn = np.random.default_rng(seed).choice(len(dataset), num_rows, replace=False)
    tiles = []
    for tile in _decode(dataset, vae, np.sort(drawn).tolist()):
        tiles.append(tile)
        if progress:
            progress(len(tiles), num_rows)
    sheet = draw_sheet(tiles)
    with named_local(target):
        sheet.save(target)
    return num_rows


def _decode(dataset: Dataset, vae: KLAutoencoder, indices: Iterable[int]) -> Iterator[Tile]:
    num_channels = dataset.contract.vae.latent_channels
    for index in indices:
        row = dataset[index]
        # The first half of moments is the mean.
        latent = row.latent[:num_channels].float().to(vae.device)
        with torch.inference_mode():
            (pixels,) = to_uint8(vae.decode(latent[None]))
        yield Tile(Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()), row.key)


def draw_sheet(tiles: Sequence[Tile]) -> Image.Image:
    """Draw tiles in lines of about equal width, each picture above its key and bucket."""
    lines = list(_break_lines(tiles))
    widths_px = [sum(width_px + _GAP_PX for _, width_px in line) for line, _ in lines]
    heights_px = [height_px + _LABEL_PX + _GAP_PX for _, height_px in lines]
    sheet = Image.new("RGB", (max(widths_px) + _GAP_PX, sum(heights_px) + _GAP_PX), _PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.font = ImageFont.load_default(_FONT_PX)
    top_px = _GAP_PX
    for line, height_px in lines:
        left_px, below_px = _GAP_PX, top_px + height_px + 3
        for tile, width_px in line:
            small = tile.image.resize((width_px, height_px), Image.Resampling.LANCZOS)
            sheet.paste(small, (left_px, top_px))
            pen.text((left_px, below_px), _shorten(pen, tile.key, width_px), _INK)
            bucket = Bucket(*tile.image.size).name
            pen.text((left_px, below_px + _FONT_PX + 2), bucket, _PALE_INK)
            left_px += width_px + _GAP_PX
        top_px += height_px + _LABEL_PX + _GAP_PX
    return sheet


_Line = tuple[list[tuple[Tile, int]], int]
"""Tiles with their widths in pixels, and their common height in pixels."""


def _break_lines(tiles: Sequence[Tile]) -> Iterator[_Line]:
    """Break tiles into lines; a line is full once it fits the width at the usual height."""
    line: list[Tile] = []
    for tile in tiles:
        line.append(tile)
        ratio = sum(tile.image.width / tile.image.height for tile in line)
        height_px = (_WIDTH_PX - (len(line) + 1) * _GAP_PX) / ratio
        if height_px <= _TILE_HEIGHT_PX:
            yield _size(line, height_px)
            line = []
    if line:
        yield _size(line, _TILE_HEIGHT_PX)


def _size(line: list[Tile], height_px: float) -> _Line:
    sizes = (tile.image.size for tile in line)
    widths_px = [max(1, round(height_px * width / height)) for width, height in sizes]
    return list(zip(line, widths_px, strict=True)), max(1, round(height_px))


def _shorten(pen: ImageDraw.ImageDraw, key: str, width_px: int) -> str:
    """Cut the beginning off a key until it fits a width; keys differ mostly at their ends."""
    # Pillow would draw a key with a line break as two lines.
    text = "".join(c if c.isprintable() else "?" for c in key)
    if pen.textlength(text) <= width_px:
        return text
    while text and pen.textlength(f"…{text}") > width_px:
        text = text[1:]
    return f"…{text}"
