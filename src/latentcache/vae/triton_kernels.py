# ruff: noqa: N803, N806, RET505  (kernel constants are upper case; triton needs the else)
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The Triton kernels that `kernels.py` launches.

Parameters of `sum_kernel` and `normalise_kernel`:

- x: [B, num_pixels, C] in any float dtype. h is another map of this form, read if HAS_H.
- bias: float32 [C], read if HAS_BIAS. weight and shift: float32 [C].
- out: a map like x, for the result. `sum_kernel` writes it if WRITES.
- statistics: float32 [B, num_chunks, 2, GP], the means and the scatters of the groups of a chunk.
- num_pixels: the pixels of an image. chunk_pixels: those of a chunk, a multiple of BLOCK.
- num_chunks: the chunks of an image. CHUNKS is this number, rounded up to a power of two.
- eps: added to the variance. SILU: whether SiLU follows.

Constants of all kernels: C channels in G groups. A group of D = C / G channels has DP lanes and G
groups have GP lanes, both rounded up to powers of two. BLOCK is the number of pixels of a tile, or
of elements for rows of scores.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def to_input_kernel(images, out, num_pixels, OUT: tl.constexpr, BLOCK: tl.constexpr):
    """Convert uint8 [B, 3, num_pixels] to [-1, 1] in [B, num_pixels, OUT]; other channels are zero.

    Args:
        images, out, num_pixels, OUT, BLOCK: a program converts BLOCK pixels to OUT channels.
    """
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, OUT)
    is_pixel = (pixel < num_pixels)[:, None]
    is_colour = (channel < 3)[None, :]
    source = images + image * 3 * num_pixels + channel[None, :] * num_pixels + pixel[:, None]
    level = tl.load(source, mask=is_pixel & is_colour, other=0).to(tl.float32)
    value = tl.where(is_colour, level / 127.5 - 1.0, 0.0)
    target = out + image * num_pixels * OUT + pixel[:, None] * OUT + channel[None, :]
    tl.store(target, value.to(out.dtype.element_ty), mask=is_pixel)


@triton.jit
def _channels(C: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr):
    """Return the channel of each lane, and whether it exists: a group has DP lanes, D channels."""
    D: tl.constexpr = C // G
    lane = tl.arange(0, GP * DP)
    if D == DP:
        channel = lane
    else:
        channel = lane // DP * D + lane % DP
    return channel, (lane % DP < D) & (lane // DP < G)


@triton.jit
def _tile_mask(is_pixel, exists, C: tl.constexpr, LANES: tl.constexpr):
    """Return the mask of the existing pixels and channels of a tile; if C == LANES, of pixels."""
    if C == LANES:
        return is_pixel[:, None]
    else:
        return is_pixel[:, None] & exists[None, :]


@triton.jit
def _group_statistics(
    origin, sums, squares, weight, count, D: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr
):
    """Return the mean and the scatter of each group, from sums of differences from `origin`."""
    # Each channel first, then its group: its variance includes the differences between channels.
    total = tl.sum(sums, axis=0)
    mean = tl.reshape(origin + total / count, (GP, DP))
    scatter = tl.reshape(tl.sum(squares, axis=0) - total * (total / count), (GP, DP))
    weight = tl.reshape(weight, (GP, DP))
    group_mean = tl.sum(mean * weight, axis=1) / D
    apart = (mean - group_mean[:, None]) * weight
    return group_mean, tl.sum(scatter * weight + count * apart * apart, axis=1)


@triton.jit
def sum_kernel(
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
    """Add the bias and a map, compute the statistics of each group in a chunk. Args: see above."""
    LANES: tl.constexpr = GP * DP
    chunk = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    first = chunk * chunk_pixels
    last = tl.minimum(first + chunk_pixels, num_pixels)
    channel, exists = _channels(C, G, GP, DP)
    add = tl.zeros((LANES,), tl.float32)
    if HAS_BIAS:
        add = tl.load(bias + channel, mask=exists, other=0.0)

    # Differences from the chunk's first pixel stay precise if the values are far from zero.
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

    count = (last - first).to(tl.float32)
    weight = exists.to(tl.float32)
    mean, scatter = _group_statistics(origin, sums, squares, weight, count, C // G, GP, DP)
    target = statistics + (image * num_chunks + chunk) * 2 * GP + tl.arange(0, GP)
    tl.store(target, mean)
    tl.store(target + GP, scatter)


@triton.jit
def normalise_kernel(
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
    """Merge the statistics of the chunks, normalise, and apply SiLU. Args: see above."""
    LANES: tl.constexpr = GP * DP
    D: tl.constexpr = C // G
    image = tl.program_id(1).to(tl.int64)

    # Merge the means and scatters of the chunks, again as differences, from the first chunk's mean.
    chunk = tl.arange(0, CHUNKS)[:, None]
    group = tl.arange(0, GP)
    source = statistics + image * num_chunks * 2 * GP
    address = source + chunk * 2 * GP + group[None, :]
    means = tl.load(address, mask=chunk < num_chunks, other=0.0)
    scatters = tl.load(address + GP, mask=chunk < num_chunks, other=0.0)
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
def pad_kernel(
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
    """Add the bias and another map, and pad with zeros at the bottom and at the right.

    Args:
        x, h, bias: [B, height, width, C] in any float dtype; h is added if HAS_H, bias if HAS_BIAS.
        out, LANES: [B, height + 1, width + 1, C]; and C, rounded up to a power of two.
    """
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
def exponentials_kernel(scores, out, sums, length, BLOCK: tl.constexpr):
    """Write exp(s - max) for a row of scores, and the sum of the rounded exponentials.

    Args:
        scores, out, sums: float32 [rows, length]; any float dtype [rows, length]; float32 [rows].
        length, BLOCK: the elements of a row, and those that a program reads at once.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    scores += row * length
    out += row * length
    # Rows of at most BLOCK elements, the common case, are read once. Longer rows are read twice.
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
