"""A contact sheet: decoded rows of a dataset side by side in one picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from latentcache.vae.model import KLAutoencoder, require_family, to_uint8
from latentcache.vae.weights import encoder_fingerprint, load_vae

_WIDTH_PX = 1440
_TILE_HEIGHT_PX = 200
_GAP_PX = 12
_FONT_PX = 13
_LABEL_PX = 2 * _FONT_PX + 10  # one line for the key and one for the bucket

_PAPER, _INK, _PALE_INK = "#ffffff", "#1b1c1e", "#6b6e74"


_Tile = tuple[Image.Image, str]  # a decoded row and its key


def load_decoder(
    dataset: Dataset, url: str | None = None, options: StorageOptions = StorageOptions()
) -> tuple[KLAutoencoder, list[str]]:
    """Load a VAE whose decoder accepts a dataset's latents, and return it with notes for the user.

    Args:
        dataset, url, options: a checkpoint as for `load_vae`; None uses `find_checkpoint`.

    Raises:
        ConfigError: the checkpoint cannot be used, or only the dataset names it.
    """
    checkpoint = url or find_checkpoint(dataset)
    try:
        vae = load_vae(checkpoint, options=options)
    except (CheckpointError, StorageError) as error:
        raise ConfigError(f"no decoder at {checkpoint}: {error}") from error
    require_family(vae, checkpoint, dataset.contract.vae)
    note = f"{checkpoint} has another encoder than the one that made these latents"
    is_same = encoder_fingerprint(vae) == dataset.contract.vae.encoder_fingerprint
    return vae.to("cuda" if torch.cuda.is_available() else "cpu"), [] if is_same else [note]


def save_sheet(
    dataset: Dataset,
    vae: KLAutoencoder,
    target: Path,
    num_rows: int = 24,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write a contact sheet of rows drawn at random, and return the number of its rows.

    Args:
        dataset, vae: the dataset, and the VAE that decodes; see `load_decoder`.
        target: a file; a suffix that Pillow does not know raises `ConfigError`.
        num_rows, seed: the number of rows (all if the dataset has fewer), and the seed of the draw.
        progress: called with (rows decoded, rows in total).
    """
    if target.suffix.lower() not in Image.registered_extensions():
        raise ConfigError(f"cannot write a picture to {target}: name it .png or .jpg")
    num_rows = min(num_rows, len(dataset))
    if not num_rows:
        raise DatasetError(f"{dataset.url} has no rows to show")
    with named_local(target), target.open("ab"):
        pass  # a path that cannot be written is reported before the decoding
    drawn = np.random.default_rng(seed).choice(len(dataset), num_rows, replace=False)
    tiles: list[_Tile] = []
    for index in np.sort(drawn).tolist():
        row = dataset[index]
        # The first half of moments is the mean.
        latent = row.latent[: dataset.contract.vae.latent_channels].float().to(vae.device)
        with torch.inference_mode():
            (pixels,) = to_uint8(vae.decode(latent[None]))
        tiles.append((Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()), row.key))
        progress(len(tiles), num_rows)
    sheet = draw_sheet(tiles)
    with named_local(target):
        sheet.save(target)
    return num_rows


def draw_sheet(tiles: Sequence[_Tile]) -> Image.Image:
    """Draw (picture, key) in lines of about equal width, each picture above its key and bucket."""
    lines = list(_break_lines(tiles))
    width_px = max(sum(size.width_px + _GAP_PX for *_, size in line) for line in lines)
    steps_px = [line[0][-1].height_px + _LABEL_PX + _GAP_PX for line in lines]
    sheet = Image.new("RGB", (width_px + _GAP_PX, sum(steps_px) + _GAP_PX), _PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.font = ImageFont.load_default(_FONT_PX)
    top_px = _GAP_PX
    for line, step_px in zip(lines, steps_px, strict=True):
        left_px = _GAP_PX
        for image, key, size in line:
            sheet.paste(image.resize(size, Image.Resampling.LANCZOS), (left_px, top_px))
            below_px = top_px + size.height_px + 3
            pen.text((left_px, below_px), _shorten(pen, key, size.width_px), _INK)
            bucket = Bucket(*image.size).name
            pen.text((left_px, below_px + _FONT_PX + 2), bucket, _PALE_INK)
            left_px += size.width_px + _GAP_PX
        top_px += step_px
    return sheet


def _break_lines(
    tiles: Sequence[_Tile],
) -> Iterator[list[tuple[Image.Image, str, Bucket]]]:
    """Break tiles into lines, each with its drawn size; a line is full once it fits the width."""
    line: list[_Tile] = []
    for number, tile in enumerate(tiles, start=1):
        line.append(tile)
        ratios = [image.width / image.height for image, _ in line]
        height_px = (_WIDTH_PX - (len(line) + 1) * _GAP_PX) / sum(ratios)
        if height_px <= _TILE_HEIGHT_PX or number == len(tiles):
            height_px = min(height_px, _TILE_HEIGHT_PX)
            widths_px = (max(1, round(height_px * ratio)) for ratio in ratios)
            sizes = [Bucket(width_px, max(1, round(height_px))) for width_px in widths_px]
            yield [(*tile, size) for tile, size in zip(line, sizes, strict=True)]
            line = []


def _shorten(pen: ImageDraw.ImageDraw, key: str, width_px: int) -> str:
    """Cut the beginning off a key until it fits a width; keys differ mostly at their ends."""
    # Pillow would draw a key with a line break as two lines.
    text = "".join(c if c.isprintable() else "?" for c in key)
    if pen.textlength(text) <= width_px:
        return text
    while text and pen.textlength(f"…{text}") > width_px:
        text = text[1:]
    return f"…{text}"
