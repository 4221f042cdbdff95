# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Triton kernels for what lies between the encoder's convolutions, on maps that are NHWC.

torch's GroupNorm goes back to NCHW and takes five passes over a map with the SiLU, the residual sum
and the convolution's bias. Here it takes two: one that sums and gathers statistics, one that
normalises. Channels are contiguous, and a program works through a chunk of one image's pixels, so
that a batch of one keeps a GPU as busy as one of 64.

Statistics are float32 and sound for values far from zero: sums are taken of differences from a
pixel of the chunk, and chunks are merged by Chan, Golub and LeVeque, "Algorithms for Computing the
Sample Variance" (1983), equation 2.1. No atomics: the same batch gives the same bits.

Only this file and `triton_kernels.py` import triton; `fast.py` imports it where a GPU is. Under
TRITON_INTERPRET=1 it runs on CPU tensors, which is how the tests see it.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from latentcache.vae.triton_kernels import (
    exponentials_kernel,
    normalise_kernel,
    pad_kernel,
    sum_kernel,
    to_input_kernel,
)

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
    to_input_kernel[grid](images, out, height * width, NUM_INPUT_CHANNELS, block)
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
    normalise_kernel[(num_chunks, batch)](
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
    pad_kernel[grid](
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
    exponentials_kernel[(sums.numel(),)](
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
    sum_kernel[(num_chunks, batch)](
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
