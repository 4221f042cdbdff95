# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Triton kernels for the operations between the encoder's convolutions, on NHWC maps.

One pass over a map sums and computes statistics, another normalises. A program processes a chunk of
one image's pixels. Chunks are merged as in Chan, Golub and LeVeque (1983), equation 2.1, in a fixed
order. With TRITON_INTERPRET=1 this runs on CPU tensors, which the tests use.
"""

from __future__ import annotations

from typing import Any

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

# The values of a tile and the warps of a program: 16 values per thread, in two reads of 16 bytes.
# This was never measured on a GPU; bench/encoder.py tries other values.
TILE = 4096
NUM_WARPS = 8

# The number of programs fills a large GPU several times. The chunks of one image are limited,
# because each normalising program reads the statistics of all of them.
NUM_PROGRAMS = 2048
MAX_CHUNKS = 256

# Convolutions do not add their bias. The next operation adds it.
FOLDS_BIAS = True

# Images get this many channels, the last ones zero: 16 bytes per pixel, as tensor cores require.
NUM_INPUT_CHANNELS = 8

# The maximum number of attention scores in memory: 512 MiB in float32, and half of that for their
# exponentials. Eight images of 512 px have as many.
MAX_SCORES = 2**27
_MAX_SOFTMAX_TILE = 16384


def to_input(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert uint8 [B, 3, H, W] to [B, H, W, 8]: three channels in [-1, 1], then zeros.

    Args:
        images, dtype: the images, and the dtype of the result.
    """
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
    """Normalise x + bias by group, optionally with SiLU.

    Args:
        x: [B, H, W, C] in any float dtype, as is the result.
        bias: float32 [C], not added to x yet; None means zero.
        statistics: the statistics of x + bias from `add`; None computes them here.
        weight, shift, num_groups, eps, silu: as in `torch.nn.GroupNorm`; and whether SiLU follows.
    """
    if statistics is None:
        statistics = _sum(x, None, bias, None, num_groups)
    sizes, constants = _layout(x, num_groups)
    out = torch.empty_like(x)
    maps = x, x if bias is None else bias, statistics, weight, shift, out
    constants |= {"CHUNKS": triton.next_power_of_2(sizes[2]), "HAS_BIAS": bias is not None}
    normalise_kernel[sizes[2], x.shape[0]](*maps, *sizes, eps, SILU=silu, **constants)
    return out


def add(x: Tensor, h: Tensor, bias: Tensor | None, num_groups: int) -> tuple[Tensor, Tensor | None]:
    """Add two maps and a bias, and compute the statistics of the sum by group.

    Args:
        x, h, bias, num_groups: maps [B, H, W, C]; float32 [C] or None for zero; a divisor of C.

    Returns:
        The sum, with x's shape and dtype, and its statistics: float32 [B, chunks, 2, groups].
    """
    out = torch.empty_like(x)
    return out, _sum(x, h, bias, out, num_groups)


def add_padded(x: Tensor, h: Tensor | None, bias: Tensor | None) -> Tensor:
    """Sum, and pad with zeros at the bottom and right to [B, H + 1, W + 1, C]. Args: see `add`."""
    batch, height, width, channels = x.shape
    out = x.new_empty((batch, height + 1, width + 1, channels))
    lanes = triton.next_power_of_2(channels)
    block = max(1, TILE // lanes)
    grid = (triton.cdiv((height + 1) * (width + 1), block), batch)
    constants = {"C": channels, "LANES": lanes, "BLOCK": block, "num_warps": NUM_WARPS}
    flags = {"HAS_H": h is not None, "HAS_BIAS": bias is not None}
    maps = x, x if h is None else h, x if bias is None else bias, out
    pad_kernel[grid](*maps, height, width, **constants, **flags)
    return out


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q kᵀ) v of scaled queries, keys and values, [B, n, C].

    Flash attention has a limit of 256 channels, below one head of 512. Two matrix products with
    float32 scores, at most `MAX_SCORES` at once, move more bytes, but are still limited by
    arithmetic. Args: see `scaled_dot_product_attention`.
    """
    batch, length, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    num_images = max(1, MAX_SCORES // length**2)
    num_queries = min(length, max(1, MAX_SCORES // length))
    for image in range(0, batch, num_images):
        images = slice(image, image + num_images)
        for query in range(0, length, num_queries):
            queries = slice(query, query + num_queries)
            scores = _multiply(q[images, queries], k[images].mT)
            weights, sums = _exponentiate(scores, v.dtype)
            torch.div(_multiply(weights, v[images]), sums, out=out[images, queries])
    return out


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """Multiply batches of matrices of any float dtype; the result is float32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def _exponentiate(scores: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return exp(s - max) of each row in `dtype`, and the float32 sums of the rounded rows."""
    length = scores.shape[-1]
    out = torch.empty_like(scores, dtype=dtype)
    sums = scores.new_empty((*scores.shape[:-1], 1))
    block = min(_MAX_SOFTMAX_TILE, triton.next_power_of_2(length))
    num_warps = min(16, max(4, block // 1024))
    exponentials_kernel[(sums.numel(),)](
        scores, out, sums, length, BLOCK=block, num_warps=num_warps
    )
    return out, sums


def _layout(x: Tensor, num_groups: int) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """Split images into chunks of whole tiles, with groups padded to powers of two.

    Returns:
        (pixels of an image, pixels of a chunk, chunks of an image), and the kernel's constants.
    """
    batch, height, width, channels = x.shape
    groups, depth = (triton.next_power_of_2(n) for n in (num_groups, channels // num_groups))
    block = max(1, TILE // (groups * depth))
    max_chunks = min(MAX_CHUNKS, triton.cdiv(NUM_PROGRAMS, batch))
    chunk_pixels = triton.cdiv(triton.cdiv(height * width, max_chunks), block) * block
    constants = {"C": channels, "G": num_groups, "GP": groups, "DP": depth, "BLOCK": block}
    num_chunks = triton.cdiv(height * width, chunk_pixels)
    return (height * width, chunk_pixels, num_chunks), constants | {"num_warps": NUM_WARPS}


def _sum(
    x: Tensor, h: Tensor | None, bias: Tensor | None, out: Tensor | None, num_groups: int
) -> Tensor:
    """Return the statistics of x + h + bias, and write the sum to `out` if it is given."""
    sizes, constants = _layout(x, num_groups)
    shape = (x.shape[0], sizes[2], 2, constants["GP"])
    statistics = x.new_empty(shape, dtype=torch.float32)
    maps = (x if operand is None else operand for operand in (x, h, bias, out))
    flags = {"HAS_H": h is not None, "HAS_BIAS": bias is not None, "WRITES": out is not None}
    sum_kernel[sizes[2], x.shape[0]](*maps, statistics, *sizes, **constants, **flags)
    return statistics
