"""The results of an evaluation, in the table format of the model card of `sd-vae-ft-mse`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from latentcache.errors import one_line

_COLUMNS = ("Model", "train steps", "rFID", "PSNR", "SSIM", "PSIM", "LPIPS", "Link", "Comments")
_GAP_PX = 4


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and population standard deviation over the images."""

    mean: float
    std: float


@dataclass(frozen=True, slots=True)
class ModelResult:
    """One row of the table. A field is None if it was not measured; the notes say why."""

    name: str
    train_steps: int | None
    rfid: float | None
    psnr_db: Spread
    ssim: Spread
    psim: Spread | None
    lpips: Spread | None
    link: str
    comments: str


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The results of several decoders on the same latents; `rejects` are by `stage: reason`."""

    name: str
    resolution_px: int
    num_images: int
    rejects: dict[str, int]
    models: list[ModelResult]
    picture_keys: list[str]
    notes: list[str]
    output: str


class Picture(NamedTuple):
    """An image and its reconstruction by each model: uint8 [1 + models, 3, H, W]."""

    key: str
    panels: npt.NDArray[np.uint8]


def render_card(evaluation: Evaluation) -> str:
    """Return the table and the notes as Markdown, with the card's number of digits."""
    rows = [_COLUMNS, *map(_cells, evaluation.models)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, tuple("-" * width for width in widths))
    side, num = evaluation.resolution_px, evaluation.num_images
    lines = [f"### {one_line(evaluation.name)} ({side}x{side}, {num} images)", ""]
    lines += [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows]
    if evaluation.notes:
        lines += ["", *(f"- {one_line(note)}" for note in evaluation.notes)]
    return "\n".join(lines)


def _cells(model: ModelResult) -> tuple[str, ...]:
    cells = (
        model.name,
        "" if model.train_steps is None else str(model.train_steps),
        "" if model.rfid is None else f"{model.rfid:.2f}",
        _spread(model.psnr_db, 1),
        _spread(model.ssim, 2),
        _spread(model.psim, 2),
        _spread(model.lpips, 3),
        model.link,
        model.comments,
    )
    # Texts of the config must not end a cell or a row.
    return tuple(" ".join(cell.split()).replace("|", r"\|") for cell in cells)


def _spread(value: Spread | None, digits: int) -> str:
    return "" if value is None else f"{value.mean:.{digits}f} ± {value.std:.{digits}f}"


def draw_side_by_side(models: Sequence[str], pictures: Sequence[Picture]) -> bytes:
    """Draw a row for each picture, the source image first, and return a PNG file.

    Args:
        models, pictures: the names above the columns, and one or more pictures of the same size.
    """
    *_, height, width = pictures[0].panels.shape
    font = ImageFont.load_default(size=max(9, min(18, width // 14)))
    assert isinstance(font, ImageFont.FreeTypeFont)  # because a size was given
    top = 2 * _GAP_PX + sum(font.getmetrics())
    step_x, step_y = width + _GAP_PX, height + _GAP_PX
    size = ((len(models) + 1) * step_x + _GAP_PX, top + len(pictures) * step_y)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for column, label in enumerate(("source image", *models)):
        left, text = _GAP_PX + column * step_x, label
        while label and font.getlength(text) > width:
            label = label[:-1]
            text = f"{label}…"
        draw.text((left + width / 2, top / 2), text, fill="black", font=font, anchor="mm")
        for row, picture in enumerate(pictures):
            panel = Image.fromarray(picture.panels[column].transpose(1, 2, 0))
            canvas.paste(panel, (left, top + row * step_y))
    buffer = BytesIO()
    canvas.save(buffer, "PNG")
    return buffer.getvalue()
