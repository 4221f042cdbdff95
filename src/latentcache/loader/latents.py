"""From stored latents to those a model is trained on."""

from __future__ import annotations

from collections.abc import Callable

import torch

from latentcache.dataset.contract import Contract
from latentcache.dataset.shards import TORCH_DTYPES
from latentcache.errors import ConfigError

Noise = Callable[[int], torch.Tensor]
"""Gives standard normal numbers, [b, count] float32."""

# MKL settles how to compute each of these at its first call. Two threads that both make that call
# may get twelve good bits instead of twenty-four (pytorch/pytorch#188792): so it is made here.
for _function in (torch.exp, torch.log, torch.sqrt, torch.sin, torch.cos):
    _function(torch.ones(64))


class LatentFinish:
    """Draws latents from stored moments, normalises and converts them.

    A model is trained on `(z - shift_factor) * scaling_factor`; where an autoencoder has statistics
    by channel, as Playground v2.5's, on `(z - latents_mean) / latents_std * scaling_factor`.

    Args:
        contract: what is stored.
        dtype: of the result.
        normalize: False leaves latents as the encoder gave them.

    Raises:
        ConfigError: dtype is not a floating-point type.
    """

    def __init__(self, contract: Contract, dtype: torch.dtype, normalize: bool) -> None:
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ConfigError(f"dtype is {dtype!r}; latents need a floating-point type")
        vae = contract.vae
        self.stored = TORCH_DTYPES[contract.latents.dtype]
        self.dtype = dtype
        self.is_moments = contract.latents.posterior == "moments"
        self.is_in_place = self.stored == dtype and not self.is_moments
        """Whether stored latents may be finished where they lie."""
        mean, std = vae.latents_mean or [vae.shift_factor], vae.latents_std or [1.0]
        self._shift = torch.tensor(mean)[:, None, None]
        self._scale = vae.scaling_factor / torch.tensor(std)[:, None, None]
        if not normalize:
            self._shift, self._scale = torch.zeros(1), torch.ones(1)
        self._shifts = bool(self._shift.any())
        self._scales = bool((self._scale != 1).any())
        self._rounds_first = dtype not in (self.stored, torch.float32, torch.float64)

    def undo(self, latents: torch.Tensor) -> torch.Tensor:
        """Undo the normalisation of [b, C, h, w] latents: float32, as the encoder gives them."""
        shift, scale = self._shift.to(latents.device), self._scale.to(latents.device)
        return latents.float() / scale + shift

    def __call__(self, stored: torch.Tensor, out: torch.Tensor, noise: Noise) -> None:
        """Finish [b, C or 2C, h, w] stored latents into `out`, [b, C, h, w].

        `out` may be `stored` itself where `is_in_place`.
        """
        shift, scale = self._shift.to(out.device), self._scale.to(out.device)
        if self.is_moments:
            mean, logvar = stored.float().chunk(2, dim=1)
            drawn = noise(mean.shape[1:].numel()).view_as(mean)
            latents = drawn.mul_(logvar.mul_(0.5).exp_()).add_(mean)
        elif self._shifts or self._rounds_first:
            latents = stored.float()
        else:  # one multiplication rounds once, in any type that holds what is stored
            latents = out.copy_(stored)
        if self._shifts:
            latents.sub_(shift)
        if self._scales:
            latents.mul_(scale)
        if latents is not out:
            out.copy_(latents)
