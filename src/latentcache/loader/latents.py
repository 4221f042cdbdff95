"""Convert stored latents to the latents that a model is trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from latentcache.dataset.contract import Contract
from latentcache.dataset.layout import TORCH_DTYPES
from latentcache.dataset.quantization import zero_and_scale
from latentcache.errors import ConfigError
from latentcache.loader.permutation import Ints

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64


class LatentFinish:
    """The conversion of stored latents: dequantize, draw from moments, normalize, cast.

    A model is trained on `(z - shift_factor) * scaling_factor`, or on
    `(z - latents_mean) / latents_std * scaling_factor` if the autoencoder has statistics per
    channel, as Playground v2.5's. Dequantization of int8 is `(q - zero_point) * scale`, so both
    steps are combined into one shift and one scale.

    Args:
        contracts: the contracts of the datasets, which differ at most in int8's quantization.
        dtype: dtype of the result.
        normalize: False leaves latents as the encoder returned them.

    Raises:
        ConfigError: `dtype` is not a floating-point type.
    """

    def __init__(self, contracts: Sequence[Contract], dtype: torch.dtype, normalize: bool) -> None:
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ConfigError(f"dtype is {dtype!r}: use a floating-point torch.dtype")
        # MKL initializes these functions at their first call. If two threads make it at once,
        # results may have 12 instead of 24 correct bits (pytorch/pytorch#188792).
        for function in (torch.exp, torch.log, torch.sqrt, torch.sin, torch.cos):
            function(torch.ones(64))
        vae, terms = contracts[0].vae, contracts[0].latents
        self.stored = TORCH_DTYPES[terms.dtype]
        self.dtype = dtype
        self._is_moments = terms.posterior == "moments"
        self._is_in_place = self.stored == dtype and not self._is_moments
        shift, scale = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        if normalize:
            mean, std = vae.latents_mean or [vae.shift_factor], vae.latents_std or [1.0]
            shift = torch.tensor(mean, dtype=torch.float64)[:, None, None]
            scale = vae.scaling_factor / torch.tensor(std, dtype=torch.float64)[:, None, None]
        self._undo = shift.float(), scale.float()
        self._moments: tuple[torch.Tensor, torch.Tensor] | None = None
        quantizations = [c.latents.quantization for c in contracts if c.latents.quantization]
        if quantizations:
            # By dataset and channel, [S, C, 1, 1].
            pairs = [zero_and_scale(quantization) for quantization in quantizations]
            zero, step = (torch.stack(parts) for parts in zip(*pairs, strict=True))
            if self._is_moments:  # drawing comes between dequantization and normalization
                self._moments = zero.float(), step.float()
            else:
                shift, scale = zero + shift / step, scale * step
        self._shift, self._scale = shift.float(), scale.float()
        self._shifts = bool(self._shift.any())
        self._scales = bool((self._scale != 1).any())
        is_wide = dtype in (torch.float32, torch.float64)
        self._rounds_last = not is_wide and (self._shifts or dtype != self.stored)

    def undo(self, latents: torch.Tensor) -> torch.Tensor:
        """Return latents [b, C, h, w] without normalization, in float32 on their device."""
        shift, scale = (part.to(latents.device) for part in self._undo)
        return latents.float() / scale + shift

    def __call__(
        self,
        stored: torch.Tensor,
        sources: Ints,
        noise: Callable[[int], torch.Tensor],
        empty: Callable[[tuple[int, ...], torch.dtype], torch.Tensor],
    ) -> torch.Tensor:
        """Return converted latents [b, C, h, w]; they may use the memory of the stored ones.

        Args:
            stored: [b, C, h, w] in the stored dtype, or [b, 2C, h, w] for moments.
            sources: int64 [b], the index of each row's dataset.
            noise: returns `count` standard normal numbers per row, float32 [b, count].
            empty: returns an uninitialized tensor of a shape and dtype.
        """
        num, channels, height, width = stored.shape
        if self._is_in_place:
            out = stored
        else:
            channels = channels // 2 if self._is_moments else channels
            out = empty((num, channels, height, width), self.dtype)

        def of_rows(part: torch.Tensor) -> torch.Tensor:
            is_by_dataset = part.ndim == 4
            return (part[sources] if is_by_dataset else part).to(out.device)

        if self._is_moments:
            moments = stored.float()
            if self._moments:
                zero, step = (of_rows(part) for part in self._moments)
                moments.sub_(zero).mul_(step)
            mean, logvar = moments.chunk(2, dim=1)
            drawn = noise(mean.shape[1:].numel()).view_as(mean)
            latents = drawn.mul_(logvar.mul_(0.5).exp_()).add_(mean)
        elif self._rounds_last:
            latents = stored.float()
        else:  # in a wide dtype, or in a narrower one in which one multiplication rounds once
            latents = out.copy_(stored)
        if self._shifts:
            latents.sub_(of_rows(self._shift))
        if self._scales:
            latents.mul_(of_rows(self._scale))
        return latents if latents is out else out.copy_(latents)


def normal(keys: torch.Tensor, count: int) -> torch.Tensor:
    """Return standard normal numbers that depend only on the key: float32 [b, count].

    Splitmix64 (Steele, Lea and Flood, 2014) hashes a counter, and the method of Box and Muller
    turns each hash into two numbers. Only the last bits of logarithm, square root, sine and cosine
    differ between devices.

    Args:
        keys, count: int64 [b] on the result's device, and how many numbers each key gets.
    """
    counters = torch.arange(1, (count + 1) // 2 + 1, device=keys.device) * _GOLDEN
    bits = mix(keys[:, None] + counters)
    # Adding 0.5 keeps the logarithm finite.
    first = (((bits >> 32) & 0xFFFFFFFF).to(torch.float32) + 0.5) * 2.0**-32
    second = (bits & 0xFFFFFFFF).to(torch.float32) * (2.0 * math.pi * 2.0**-32)
    radius = first.log_().mul_(-2.0).sqrt_()
    return torch.cat([radius * second.cos(), radius * second.sin()], dim=1)[:, :count]


def mix(state: torch.Tensor) -> torch.Tensor:
    """Return a one-to-one hash of int64 numbers of any shape: the finalizer of splitmix64.

    The masks are needed because torch's right shift extends the sign.
    """
    state = (state ^ ((state >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    state = (state ^ ((state >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    return state ^ ((state >> 31) & (2**33 - 1))
