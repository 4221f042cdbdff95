# ruff: noqa: N803, N806, RET505  (constants of a kernel are written so; triton wants the else)
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Triton kernels for what lies between the encoder's convolutions, on maps that are NHWC.

torch's GroupNorm goes back to NCHW and takes five passes over a map with the SiLU, the residual sum
and the convolution's bias. Here it takes two: one that sums and gathers statistics, one that
normalises. Channels are contiguous, and a program works through a chunk of one image's pixels, so
that a batch of one keeps a GPU as busy as one of 64.

Statistics are float32 and sound for values far from zero: sums are taken of differences from a
pixel of the chunk, and chunks are merged by Chan, Golub and LeVeque, "Algorithms for Computing the
Sample Variance" (1983), equation 2.1. No atomics: the same batch gives the same bits.

This file alone imports triton; `fast.py` does so where a GPU is. Under TRITON_INTERPRET=1 it runs
on CPU tensors, which is how the tests see it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Values of a tile, and the warps that carry them: 16 values a thread, so two reads of 16 bytes from
# each map before the first is needed, and registers for two or three programs at once on a
# multiprocessor of sm_90. Never measured on a GPU: bench/encoder.py tries others.
TILE = 4096
NUM_WARPS = 8

# Programs that fill a large GPU several times over; and chunks of one image at most, for each
# program that normalises reads the statistics of all of them.
NUM_PROGRAMS = 2048
MAX_CHUNKS = 256

# Convolutions leave out their bias, and what follows adds it in passing.
FOLDS_BIAS = True

# Images are given this many channels, the last ones zero: 16 bytes a pixel, which tensor cores ask.
NUM_INPUT_CHANNELS = 8

# Attention scores held at once: 512 MiB in float32, and half of that for their exponentials. One
# image of 1024 px has twice as many, and eight of 512 px just as many.
MAX_SCORES = 2**27
_MAX_SOFTMAX_TILE = 16384


def to_input(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn uint8 [B, 3, H, W] into [B, H, W, 8] of that dtype: [-1, 1] and then zeros."""
    batch, _, height, width = images.shape
    images = images.contiguous()
    out = images.new_empty((batch, height, width, NUM_INPUT_CHANNELS), dtype=dtype)
    block = 1024
    grid = (triton.cdiv(height * width, block), batch)
    _to_input_kernel[grid](images, out, height * width, NUM_INPUT_CHANNELS, block)
    return out


def group_norm(
    x: Tensor,
    bias: Tensor | None,
    statistics: Tensor | None,
    weight: Tensor,
    shift: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
) -> Tensor:
    """Normalise x + bias by group, with SiLU or without.

    Args:
        x: [B, H, W, C] in any float dtype.
        bias: float32 [C], yet to be added to x; None is zero.
        statistics: of x + bias, as `add` gives them; None has them gathered here.
        weight: float32 [C].
        shift: float32 [C].
        num_groups: a divisor of C.
        eps: added to the variance.
        silu: whether SiLU follows.

    Returns:
        Like x.
    """
    if statistics is None:
        statistics = _sum(x, None, bias, None, num_groups)
    batch, height, width, channels = x.shape
    lanes = _Lanes(channels, num_groups)
    chunk_pixels, num_chunks = _chunks(batch, height * width, lanes.block)
    out = torch.empty_like(x)
    _normalise_kernel[(num_chunks, batch)](
        x,
        x if bias is None else bias,
        statistics,
        weight,
        shift,
        out,
        height * width,
        chunk_pixels,
        num_chunks,
        eps,
        C=channels,
        G=num_groups,
        GP=lanes.groups,
        DP=lanes.depth,
        BLOCK=lanes.block,
        CHUNKS=triton.next_power_of_2(num_chunks),
        HAS_BIAS=bias is not None,
        SILU=silu,
        num_warps=NUM_WARPS,
    )
    return out


def add(x: Tensor, h: Tensor, bias: Tensor | None, num_groups: int) -> tuple[Tensor, Tensor | None]:
    """Sum two maps [B, H, W, C] and a float32 bias [C], and gather the sum's statistics by group.

    Returns:
        The sum, like x; and its statistics for `group_norm`, float32 [B, chunks, 2, groups].
    """
    out = torch.empty_like(x)
    return out, _sum(x, h, bias, out, num_groups)


def add_padded(x: Tensor, h: Tensor | None, bias: Tensor | None) -> Tensor:
    """Sum like `add`, with a row of zeros below and a column of zeros at the right.

    Returns:
        [B, H + 1, W + 1, C], what a stride-2 convolution of the encoder takes.
    """
    batch, height, width, channels = x.shape
    out = x.new_empty((batch, height + 1, width + 1, channels))
    lanes = triton.next_power_of_2(channels)
    block = max(1, TILE // lanes)
    grid = (triton.cdiv((height + 1) * (width + 1), block), batch)
    _pad_kernel[grid](
        x,
        x if h is None else h,
        x if bias is None else bias,
        out,
        height,
        width,
        C=channels,
        LANES=lanes,
        BLOCK=block,
        HAS_H=h is not None,
        HAS_BIAS=bias is not None,
        num_warps=NUM_WARPS,
    )
    return out


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Give softmax(q kᵀ) v of [B, n, C] each; the scale is in q.

    One head of 512 channels is more than flash attention takes (256), and what torch falls back to
    keeps no accumulator of that width in registers. Two matrix products with float32 scores between
    them move more bytes and are still bound by arithmetic; as many queries at once as `MAX_SCORES`.
    """
    batch, length, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    num_images = max(1, MAX_SCORES // length**2)
    num_queries = min(length, max(1, MAX_SCORES // length))
    for image in range(0, batch, num_images):
        images = slice(image, image + num_images)
        for query in range(0, length, num_queries):
            queries = slice(query, query + num_queries)
            scores = _product(q[images, queries], k[images].mT)
            weights, sums = _exponentials(scores, v.dtype)
            torch.div(_product(weights, v[images]), sums, out=out[images, queries])
    return out


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply batches of matrices, with a float32 result whatever they are."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def _exponentials(scores: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Give exp(s - max) of each row, and the rows' sums: a softmax but for the division.

    Args:
        scores: float32 [..., n], contiguous.
        dtype: of the exponentials.

    Returns:
        Exponentials like scores, and float32 [..., 1], the sums of them as rounded.
    """
    length = scores.shape[-1]
    out = torch.empty_like(scores, dtype=dtype)
    sums = scores.new_empty((*scores.shape[:-1], 1))
    block = min(_MAX_SOFTMAX_TILE, triton.next_power_of_2(length))
    num_warps = min(16, max(4, block // 1024))
    _exponentials_kernel[(sums.numel(),)](
        scores, out, sums, length, BLOCK=block, num_warps=num_warps
    )
    return out, sums


class _Lanes:
    """How channels are laid out over a tile: groups padded to powers of two, in both directions."""

    def __init__(self, channels: int, num_groups: int) -> None:
        self.groups = triton.next_power_of_2(num_groups)
        self.depth = triton.next_power_of_2(channels // num_groups)
        self.block = max(1, TILE // (self.groups * self.depth))
        """Pixels of a tile."""


def _chunks(batch: int, num_pixels: int, block: int) -> tuple[int, int]:
    """Cut an image into chunks of whole tiles: pixels of a chunk, and how many chunks."""
    wanted = min(MAX_CHUNKS, triton.cdiv(NUM_PROGRAMS, batch))
    chunk_pixels = triton.cdiv(triton.cdiv(num_pixels, wanted), block) * block
    return chunk_pixels, triton.cdiv(num_pixels, chunk_pixels)


def _sum(
    x: Tensor, h: Tensor | None, bias: Tensor | None, out: Tensor | None, num_groups: int
) -> Tensor:
    """Gather the statistics of x + h + bias, and write the sum if there is an `out`."""
    batch, height, width, channels = x.shape
    lanes = _Lanes(channels, num_groups)
    chunk_pixels, num_chunks = _chunks(batch, height * width, lanes.block)
    statistics = x.new_empty((batch, num_chunks, 2, lanes.groups), dtype=torch.float32)
    _sum_kernel[(num_chunks, batch)](
        x,
        x if h is None else h,
        x if bias is None else bias,
        x if out is None else out,
        statistics,
        height * width,
        chunk_pixels,
        num_chunks,
        C=channels,
        G=num_groups,
        GP=lanes.groups,
        DP=lanes.depth,
        BLOCK=lanes.block,
        HAS_H=h is not None,
        HAS_BIAS=bias is not None,
        WRITES=out is not None,
        num_warps=NUM_WARPS,
    )
    return statistics


@triton.jit
def _to_input_kernel(images, out, num_pixels, OUT: tl.constexpr, BLOCK: tl.constexpr):
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, OUT)
    there = (pixel < num_pixels)[:, None]
    is_colour = (channel < 3)[None, :]
    source = images + image * 3 * num_pixels + channel[None, :] * num_pixels + pixel[:, None]
    level = tl.load(source, mask=there & is_colour, other=0).to(tl.float32)
    value = tl.where(is_colour, level / 127.5 - 1.0, 0.0)
    target = out + image * num_pixels * OUT + pixel[:, None] * OUT + channel[None, :]
    tl.store(target, value.to(out.dtype.element_ty), mask=there)


@triton.jit
def _channels(C: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr):
    """The channel of each lane, and whether there is one: a group has DP lanes and D channels."""
    D: tl.constexpr = C // G
    lane = tl.arange(0, GP * DP)
    if D == DP:
        channel = lane
    else:
        channel = lane // DP * D + lane % DP
    return channel, (lane % DP < D) & (lane // DP < G)


@triton.jit
def _tile_mask(there, exists, C: tl.constexpr, LANES: tl.constexpr):
    """Which pixels and channels of a tile are there; of the pixels alone where no lane is idle."""
    if C == LANES:
        return there[:, None]
    else:
        return there[:, None] & exists[None, :]


@triton.jit
def _sum_kernel(
    x,
    h,
    bias,
    out,
    statistics,
    num_pixels,
    chunk_pixels,
    num_chunks,
    C: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    DP: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_H: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WRITES: tl.constexpr,
):
    LANES: tl.constexpr = GP * DP
    chunk = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    first = chunk * chunk_pixels
    last = tl.minimum(first + chunk_pixels, num_pixels)
    channel, exists = _channels(C, G, GP, DP)
    add = tl.zeros((LANES,), tl.float32)
    if HAS_BIAS:
        add = tl.load(bias + channel, mask=exists, other=0.0)

    # Differences from the chunk's first pixel keep what the squares would lose far from zero.
    start = (image * num_pixels + first) * C
    origin = tl.load(x + start + channel, mask=exists, other=0.0).to(tl.float32) + add
    if HAS_H:
        origin += tl.load(h + start + channel, mask=exists, other=0.0).to(tl.float32)

    row = tl.arange(0, BLOCK)
    inside = row[:, None] * C + channel[None, :]
    sums = tl.zeros((BLOCK, LANES), tl.float32)
    squares = tl.zeros((BLOCK, LANES), tl.float32)
    for pixel in range(first, last, BLOCK):
        mask = _tile_mask(row < last - pixel, exists, C, LANES)
        start = (image * num_pixels + pixel) * C
        value = tl.load(x + start + inside, mask=mask, other=0.0).to(tl.float32)
        if HAS_H:
            value += tl.load(h + start + inside, mask=mask, other=0.0).to(tl.float32)
        value += add[None, :]
        if WRITES:
            rounded = value.to(out.dtype.element_ty)
            tl.store(out + start + inside, rounded, mask=mask)
            value = rounded.to(tl.float32)
        difference = tl.where(mask, value - origin[None, :], 0.0)
        sums += difference
        squares += difference * difference

    # Of each channel, then of its group: what channels differ by belongs to the group's variance.
    count = (last - first).to(tl.float32)
    total = tl.sum(sums, axis=0)
    mean = tl.reshape(origin + total / count, (GP, DP))
    scatter = tl.reshape(tl.sum(squares, axis=0) - total * (total / count), (GP, DP))
    weight = tl.reshape(exists.to(tl.float32), (GP, DP))
    group_mean = tl.sum(mean * weight, axis=1) / (C // G)
    apart = (mean - group_mean[:, None]) * weight
    group_scatter = tl.sum(scatter * weight + count * apart * apart, axis=1)
    target = statistics + (image * num_chunks + chunk) * 2 * GP + tl.arange(0, GP)
    tl.store(target, group_mean)
    tl.store(target + GP, group_scatter)


@triton.jit
def _normalise_kernel(
    x,
    bias,
    statistics,
    weight,
    shift,
    out,
    num_pixels,
    chunk_pixels,
    num_chunks,
    eps,
    C: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    DP: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
):
    LANES: tl.constexpr = GP * DP
    D: tl.constexpr = C // G
    image = tl.program_id(1).to(tl.int64)

    # Merge the chunks' means and scatters; again as differences, from the first chunk's mean.
    chunk = tl.arange(0, CHUNKS)[:, None]
    group = tl.arange(0, GP)
    source = statistics + image * num_chunks * 2 * GP
    found = source + chunk * 2 * GP + group[None, :]
    means = tl.load(found, mask=chunk < num_chunks, other=0.0)
    scatters = tl.load(found + GP, mask=chunk < num_chunks, other=0.0)
    left = tl.maximum(num_pixels - chunk * chunk_pixels, 0)
    counts = tl.minimum(left, chunk_pixels).to(tl.float32)
    origin = tl.load(source + group)
    mean = origin + tl.sum((means - origin[None, :]) * counts, axis=0) / num_pixels
    apart = means - mean[None, :]
    scatter = tl.sum(scatters + counts * D * apart * apart, axis=0)
    inverse_std = 1.0 / tl.sqrt(scatter / D / num_pixels + eps)

    channel, exists = _channels(C, G, GP, DP)
    offset = -tl.reshape(tl.broadcast_to(mean[:, None], (GP, DP)), (LANES,))
    scale = tl.reshape(tl.broadcast_to(inverse_std[:, None], (GP, DP)), (LANES,))
    scale *= tl.load(weight + channel, mask=exists, other=0.0)
    end = tl.load(shift + channel, mask=exists, other=0.0)
    if HAS_BIAS:
        offset += tl.load(bias + channel, mask=exists, other=0.0)

    first = tl.program_id(0) * chunk_pixels
    last = tl.minimum(first + chunk_pixels, num_pixels)
    row = tl.arange(0, BLOCK)
    inside = row[:, None] * C + channel[None, :]
    for pixel in range(first, last, BLOCK):
        mask = _tile_mask(row < last - pixel, exists, C, LANES)
        start = (image * num_pixels + pixel) * C
        value = tl.load(x + start + inside, mask=mask, other=0.0).to(tl.float32)
        value = (value + offset[None, :]) * scale[None, :] + end[None, :]
        if SILU:
            value = value * tl.sigmoid(value)
        tl.store(out + start + inside, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _pad_kernel(
    x,
    h,
    bias,
    out,
    height,
    width,
    C: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_H: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    num_padded = (height + 1) * (width + 1)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = pixel // (width + 1)
    column = pixel % (width + 1)
    channel = tl.arange(0, LANES)
    mask = _tile_mask(pixel < num_padded, channel < C, C, LANES)
    is_image = ((row < height) & (column < width))[:, None]
    source = (image * height * width + row * width + column) * C
    from_ = source[:, None] + channel[None, :]
    value = tl.load(x + from_, mask=mask & is_image, other=0.0).to(tl.float32)
    if HAS_H:
        value += tl.load(h + from_, mask=mask & is_image, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + channel, mask=channel < C, other=0.0)[None, :]
    value = tl.where(is_image, value, 0.0)
    target = (image * num_padded + pixel) * C
    tl.store(out + target[:, None] + channel[None, :], value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _exponentials_kernel(scores, out, sums, length, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    scores += row * length
    out += row * length
    # Rows of up to a tile, the common ones, are read once; longer ones twice.
    head = tl.load(scores + column, mask=column < length, other=float("-inf"))
    highest = tl.max(head, axis=0)
    for start in range(BLOCK, length, BLOCK):
        more = tl.load(scores + start + column, mask=column < length - start, other=float("-inf"))
        highest = tl.maximum(highest, tl.max(more, axis=0))
    rounded = tl.exp(head - highest).to(out.dtype.element_ty)
    tl.store(out + column, rounded, mask=column < length)
    total = tl.sum(rounded.to(tl.float32), axis=0)
    for start in range(BLOCK, length, BLOCK):
        more = tl.load(scores + start + column, mask=column < length - start, other=float("-inf"))
        rounded = tl.exp(more - highest).to(out.dtype.element_ty)
        tl.store(out + start + column, rounded, mask=column < length - start)
        total += tl.sum(rounded.to(tl.float32), axis=0)
    tl.store(sums + row, total)
