"""Synthetic pictures with the statistics of photographs, drawn from a seed.

They share with photographs: occlusion of objects whose sizes follow a power law (the dead-leaves
model: Lee, Mumford and Huang, "Occlusion models for natural images", 2001), 1/f spectra, smooth
shading, and colours that vary most in luminance, less from warm to cool, and least from green to
magenta (Ruderman et al., 1998).
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Floats = NDArray[np.float32]  # images here: [H, W] or [H, W, 3], nominally in [0, 1]
Layer = tuple[Floats, str]  # pixels and the words for the caption

# Luminance, warm-cool and green-magenta axes as RGB directions.
_OPPONENT_AXES = np.array([[1.0, 1.0, 1.0], [1.0, 0.1, -1.1], [-0.55, 1.0, -0.45]], np.float32)
_SYLLABLES = "ka lo mi tra ven sul do pe ri chan ost ber ly qua zin for gu hem".split()  # noqa: SIM905


def draw_image(
    rng: np.random.Generator, width_px: int, height_px: int
) -> tuple[NDArray[np.uint8], str]:
    """Draw one picture; return its pixels, uint8 [height_px, width_px, 3], and a caption.

    Args:
        rng, width_px, height_px: the same state of the generator and size give the same picture.
    """
    canvas, caption = _draw_scene(rng, width_px, height_px)
    canvas = _adjust_tones(rng, canvas)
    if rng.random() < 0.5:  # sensor noise of up to about 5 of 255 levels
        amplitude = np.float32(rng.uniform(0.0, 0.02))
        noise = rng.standard_normal((height_px, width_px, 1), dtype=np.float32)
        canvas = canvas + amplitude * noise
    pixels = np.rint(canvas * 255.0).clip(0, 255).astype(np.uint8)
    if rng.random() < 0.3:
        pixels, words = _write_text(rng, pixels)
        caption = f"{caption}, with the words “{words}”"
    return pixels, caption


def _draw_scene(rng: np.random.Generator, width: int, height: int) -> Layer:
    """Draw one layer, or two layers joined along a ragged or a soft edge."""
    layers: list[Callable[[np.random.Generator, int, int], Layer]]
    layers = [_leaves, _texture, _gradient, _bands]
    chances = [0.7, 0.16, 0.06, 0.08]
    first, words = layers[rng.choice(4, p=chances)](rng, width, height)
    if rng.random() < 0.55:
        return first, words
    second, more_words = layers[rng.choice(4, p=chances)](rng, width, height)
    mask = _mask(rng, width, height)[..., None]
    return first + mask * (second - first), f"{words} and {more_words}"


def _leaves(rng: np.random.Generator, width: int, height: int) -> Layer:
    """Draw dead leaves: overlapping shapes whose sizes follow a power law.

    Shapes are painted as numbers into an index map of twice the size. Halving it smooths the edges.
    """
    num_leaves = int(np.exp(rng.uniform(np.log(30), np.log(700))))
    index, kind = _index_map(rng, 2 * width, 2 * height, num_leaves)
    num_rows = num_leaves + 1
    colours = _palette(rng, num_rows)
    y, x = _grid(2 * width, 2 * height)

    slopes = rng.normal(0.0, rng.uniform(0.0, 0.35), (2, num_rows)).astype(np.float32)
    light = 1.0 + slopes[0][index] * x + slopes[1][index] * y
    if rng.random() < 0.5:
        striped = rng.random(num_rows) < rng.uniform(0.05, 0.5)
        waves = rng.normal(0.0, rng.uniform(20.0, 160.0), (2, num_rows)).astype(np.float32)
        depth = np.where(striped, rng.uniform(0.02, 0.4, num_rows), 0.0).astype(np.float32)
        light += depth[index] * np.sin(waves[0][index] * x + waves[1][index] * y)
    large = colours[index] * light[..., None]
    canvas = 0.25 * (large[::2, ::2] + large[1::2, ::2] + large[::2, 1::2] + large[1::2, 1::2])

    roughness = np.abs(rng.normal(0.0, rng.uniform(0.02, 0.16), num_rows)).astype(np.float32)
    noise = _power_noise(rng, width, height, slope=rng.uniform(0.4, 1.3))
    canvas += (roughness[index[::2, ::2]] * noise)[..., None]
    if rng.random() < 0.3:  # objects behind are out of focus
        canvas = _blur(canvas, radius_px=rng.uniform(0.3, 2.0))
    count = "a few" if num_leaves < 120 else "many" if num_leaves < 450 else "countless"
    return canvas, f"{count} overlapping {kind}"


def _index_map(
    rng: np.random.Generator, width: int, height: int, num_leaves: int
) -> tuple[NDArray[np.int32], str]:
    """Draw the number of the topmost shape at each pixel: int32 [height, width], 0 for no shape."""
    kind = str(rng.choice(["discs", "shards", "boxes", "shapes"], p=[0.2, 0.3, 0.2, 0.3]))
    side = min(width, height)
    low, high = rng.uniform(0.008, 0.03) * side, rng.uniform(0.2, 0.6) * side
    # Inverse of the cumulative distribution of a density r^-3 between low and high.
    u = rng.random(num_leaves)
    radii = (low**-2 + u * (high**-2 - low**-2)) ** -0.5
    if rng.random() < 0.6:  # large shapes behind, so that small ones are visible
        radii = np.sort(radii)[::-1]
    centres = rng.random((num_leaves, 2)) * (width, height)

    image = Image.new("I", (width, height), 0)
    pen = ImageDraw.Draw(image)
    for number, (radius, (cx, cy)) in enumerate(zip(radii, centres, strict=True), start=1):
        shape = str(rng.choice(["discs", "shards", "boxes"])) if kind == "shapes" else kind
        if shape == "discs":
            pen.ellipse((cx - radius, cy - radius, cx + radius, cy + radius), fill=number)
            continue
        if shape == "boxes":
            angles = rng.random() * 2 * np.pi + np.array([0.0, 0.0, np.pi, np.pi])
            aspect = rng.uniform(0.2, 1.3)
            angles = angles + aspect * np.array([-0.5, 0.5, -0.5, 0.5])
            reach = np.full(4, radius)
        else:
            angles = np.sort(rng.random(int(rng.integers(3, 9))) * 2 * np.pi)
            reach = radius * rng.uniform(0.5, 1.3, len(angles))
        corners = np.stack([cx + reach * np.cos(angles), cy + reach * np.sin(angles)], axis=1)
        pen.polygon(corners.ravel().tolist(), fill=number)
    return np.asarray(image, dtype=np.int32), kind


def _texture(rng: np.random.Generator, width: int, height: int) -> Layer:
    """Draw coloured noise with a power-law spectrum, such as clouds, stone, grass or fur."""
    slope = rng.uniform(0.8, 1.9)
    stretch = float(np.exp(rng.normal(0.0, 0.6)))
    luminance = _power_noise(rng, width, height, slope=slope, stretch=stretch)
    colours = _palette(rng, 2)
    mix = _power_noise(rng, width, height, slope=slope + 0.3) * 0.5 + 0.5
    canvas = colours[0] + mix[..., None] * (colours[1] - colours[0])
    canvas = canvas + (rng.uniform(0.05, 0.28) * luminance)[..., None]
    return canvas, "drifting clouds" if slope > 1.4 else "rough stone"


def _gradient(rng: np.random.Generator, width: int, height: int) -> Layer:
    """Draw a blend of four corner colours, such as a sky or a wall."""
    y, x = _grid(width, height)
    a, b, c, d = _palette(rng, 4)
    u, v = x[..., None] + 0.5, y[..., None] + 0.5
    return (a * (1 - u) + b * u) * (1 - v) + (c * (1 - u) + d * u) * v, "a smooth evening sky"


def _bands(rng: np.random.Generator, width: int, height: int) -> Layer:
    """Draw soft or hard wavy bands, such as cloth, dunes or fences."""
    y, x = _grid(width, height)
    angle = rng.uniform(0.0, np.pi)
    bend = _power_noise(rng, width, height, slope=2.0) * rng.uniform(0.0, 1.5)
    phase = np.exp(rng.uniform(2.0, 5.0)) * (np.cos(angle) * x + np.sin(angle) * y) + bend
    wave = (0.5 + 0.5 * np.tanh(np.exp(rng.uniform(-1.0, 2.0)) * np.sin(phase)))[..., None]
    dark, bright = _palette(rng, 2)
    canvas = dark + wave * (bright - dark)
    noise = _power_noise(rng, width, height, slope=1.0)
    return canvas + (rng.uniform(0.0, 0.08) * noise)[..., None], "wavy bands"


def _mask(rng: np.random.Generator, width: int, height: int) -> Floats:
    """Draw a mask of zeros and ones with an edge between them: a horizon, or blobs."""
    y, x = _grid(width, height)
    field = _power_noise(rng, width, height, slope=2.0)
    if rng.random() < 0.5:
        field = y + rng.uniform(-0.3, 0.3) * x + 0.1 * field + rng.uniform(-0.25, 0.25)
    sharpness = np.exp(rng.uniform(1.0, 5.0))
    mask: Floats = np.clip(0.5 + sharpness * field, 0.0, 1.0).astype(np.float32)
    return mask


def _palette(rng: np.random.Generator, num_colours: int) -> Floats:
    """Draw related colours, [num_colours, 3]. Most of their spread is in luminance."""
    centre = rng.normal((rng.uniform(0.25, 0.65), 0.0, 0.0), (0.0, 0.08, 0.04))
    spread = np.array([rng.uniform(0.08, 0.32), rng.uniform(0.01, 0.12), rng.uniform(0.005, 0.05)])
    colours = rng.normal(centre, spread, (num_colours, 3)).astype(np.float32) @ _OPPONENT_AXES
    vivid = rng.random(num_colours) < rng.uniform(0.0, 0.12)
    for i in np.flatnonzero(vivid):
        hue, saturation, value = rng.random(), rng.uniform(0.5, 1.0), rng.uniform(0.3, 1.0)
        colours[i] = colorsys.hsv_to_rgb(hue, saturation, value)
    return colours.clip(0.0, 1.0)


def _power_noise(
    rng: np.random.Generator, width: int, height: int, *, slope: float, stretch: float = 1.0
) -> Floats:
    """Draw noise [H, W] of mean 0 and standard deviation 1 with an amplitude of 1/f**slope."""
    fy = np.fft.fftfreq(height)[:, None].astype(np.float32) * height
    fx = np.fft.rfftfreq(width)[None, :].astype(np.float32) * width
    radius = np.sqrt((fx * stretch) ** 2 + (fy / stretch) ** 2)
    radius[0, 0] = np.inf
    white = rng.standard_normal((height, width), dtype=np.float32)
    noise = np.fft.irfft2(np.fft.rfft2(white) * radius**-slope, s=(height, width))
    return (noise / max(float(noise.std()), 1e-12)).astype(np.float32)


def _adjust_tones(rng: np.random.Generator, canvas: Floats) -> Floats:
    """Apply shading and a contrast curve, as light and a camera do."""
    height, width = canvas.shape[:2]
    if rng.random() < 0.5:
        y, x = _grid(width, height)
        light = 1.0 + rng.normal(0.0, 0.35) * x + rng.normal(0.0, 0.35) * y
        canvas = canvas * light[..., None]
    gamma = np.exp(rng.normal(0.0, 0.25))
    return canvas.clip(0.0, 1.0) ** np.float32(gamma)


def _write_text(
    rng: np.random.Generator, pixels: NDArray[np.uint8]
) -> tuple[NDArray[np.uint8], str]:
    """Write some invented words in Pillow's default font and one colour."""
    height, width = pixels.shape[:2]
    image = Image.fromarray(pixels)
    pen = ImageDraw.Draw(image)
    words = " ".join(
        "".join(rng.choice(_SYLLABLES, size=int(rng.integers(1, 4))))
        for _ in range(int(rng.integers(1, 4)))
    )
    size_px = max(8, int(min(width, height) * rng.uniform(0.05, 0.2)))
    colour = tuple(int(value) for value in _palette(rng, 1)[0] * 255)
    if rng.random() < 0.5:
        colour = (255, 255, 255) if rng.random() < 0.5 else (0, 0, 0)
    position = (rng.uniform(-0.1, 0.6) * width, rng.uniform(0.0, 0.9) * height)
    pen.text(position, words, fill=colour, font=ImageFont.load_default(size_px))
    return np.asarray(image), words


def _blur(canvas: Floats, radius_px: float) -> Floats:
    """Blur [H, W, 3] with a Gaussian, by its spectrum (the picture wraps around)."""
    fy = np.fft.fftfreq(canvas.shape[0])[:, None, None]
    fx = np.fft.rfftfreq(canvas.shape[1])[None, :, None]
    response = np.exp(-2.0 * (np.pi * radius_px) ** 2 * (fx**2 + fy**2)).astype(np.float32)
    spectrum = np.fft.rfft2(canvas, axes=(0, 1)) * response
    return np.fft.irfft2(spectrum, s=canvas.shape[:2], axes=(0, 1)).astype(np.float32)


def _grid(width: int, height: int) -> tuple[Floats, Floats]:
    """Return the row and column coordinates, each [H, W], from -0.5 to 0.5."""
    y = np.linspace(-0.5, 0.5, height, dtype=np.float32)[:, None]
    x = np.linspace(-0.5, 0.5, width, dtype=np.float32)[None, :]
    return np.broadcast_to(y, (height, width)), np.broadcast_to(x, (height, width))
