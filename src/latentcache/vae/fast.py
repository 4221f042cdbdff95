"""The encoder of `model.py`, optimised for the device: the same function with fused operations.

Maps are [B, H, W, C]. `quant_conv` is multiplied into `conv_out`, the scale of attention into
`to_q`, and the bias of `to_v` is added after `to_out`, because the weights of attention sum to one.
`kernels.py` on a GPU and `plain.py` on a CPU have the other operations.
"""

from __future__ import annotations

import copy
import functools
import importlib
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentcache.errors import one_line
from latentcache.vae import plain
from latentcache.vae.model import (
    LOGVAR_MAX,
    LOGVAR_MIN,
    Attention,
    Downsample,
    KLAutoencoder,
    MidBlock,
    ResnetBlock,
    require_images,
)

Encode = Callable[[Tensor], Tensor]
"""Encodes uint8 [B, 3, H, W] to float32 moments [B, 2C, H/f, W/f], like `KLAutoencoder.encode`."""

_Map = tuple[Tensor, Tensor | None]  # [B, H, W, C], and its statistics by group if they are known


def fastest_encode(vae: KLAutoencoder, dtype: torch.dtype) -> Encode:
    """Return the fastest encode function for the VAE's device; a copy of the reference at worst.

    Args:
        vae, dtype: the VAE in fp32 on its device; and the dtype of the computation.
    """
    if vae.device.type != "cuda":
        return FastEncoder(vae, dtype, plain)
    kernels = _working_kernels(vae.device)
    if isinstance(kernels, ModuleType):
        return FastEncoder(vae, dtype, kernels)
    return copy.deepcopy(vae).to(dtype).encode


def triton_version(device: torch.device) -> str | None:
    """Return the version of triton on a GPU, or `unusable: ` and the reason; None on a CPU."""
    if device.type != "cuda":
        return None
    kernels = _working_kernels(device)
    if isinstance(kernels, ModuleType):
        return str(kernels.triton.__version__)
    return f"unusable: {kernels}"


@functools.cache
def _working_kernels(device: torch.device) -> ModuleType | str:
    """Load `kernels.py` and test it; return the reason if triton cannot be used."""
    try:
        kernels = importlib.import_module("latentcache.vae.kernels")
        kernels.to_input(torch.zeros((1, 3, 8, 8), dtype=torch.uint8, device=device), torch.float16)
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = one_line(str(error).strip().partition("\n")[0])
        print(
            f"encoding without fused kernels, which is slower: triton cannot be used ({reason})",
            file=sys.stderr,
        )
        return reason
    return kernels


class _Target(NamedTuple):
    """The dtype to which layers are converted, and the module `kernels` or `plain`."""

    dtype: torch.dtype
    kernels: ModuleType


class FastEncoder:
    """A VAE's encoder and `quant_conv`, with the interface of `KLAutoencoder.encode`.

    Args:
        vae, dtype, kernels: the VAE in fp32, the computation's dtype, and `kernels` or `plain`.
    """

    @torch.no_grad()
    def __init__(self, vae: KLAutoencoder, dtype: torch.dtype, kernels: ModuleType) -> None:
        self._kernels, self._dtype = kernels, dtype
        self._factor = vae.architecture.downsample_factor
        target, parts = _Target(dtype, kernels), dict(vae.encoder.named_children())
        # Images get additional channels of zeros.
        weight, bias = _weights(parts["conv_in"])
        num_zeros = kernels.NUM_INPUT_CHANNELS - weight.shape[1]
        self._conv_in = _Conv(F.pad(weight, (0, 0, 0, 0, 0, num_zeros)), bias, target)
        self._layers: list[_Resnet | _Attention] = []
        deferred_bias = self._conv_in.deferred_bias
        middle, kinds = parts["mid_block"], ResnetBlock | Downsample
        assert isinstance(middle, MidBlock)
        layers: list[nn.Module] = []
        layers += (layer for layer in parts["down_blocks"].modules() if isinstance(layer, kinds))
        layers += [middle.resnets[0], *middle.attentions, middle.resnets[1]]
        for layer, following in zip(layers, [*layers[1:], None], strict=True):
            if isinstance(layer, ResnetBlock):
                halve = following if isinstance(following, Downsample) else None
                self._layers.append(_Resnet(layer, halve, deferred_bias, target))
            elif isinstance(layer, Attention):
                self._layers.append(_Attention(layer, deferred_bias, target))
            deferred_bias = self._layers[-1].deferred_bias
        self._norm_out = _norm(parts["conv_norm_out"], deferred_bias, kernels, silu=True)
        weight, bias = _weights(parts["conv_out"])
        if isinstance(vae.quant_conv, nn.Conv2d):
            matrix, quant_bias = _weights(vae.quant_conv)
            matrix = matrix[:, :, 0, 0]
            weight = torch.einsum("om,mihw->oihw", matrix, weight)
            bias = matrix @ bias + quant_bias
        self._conv_out = _Conv(weight, bias, target)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Encode uint8 [B, 3, H, W] to float32 moments [B, 2C, H/f, W/f]."""
        require_images(images, self._factor)
        x = self._conv_in(self._kernels.to_input(images, self._dtype))
        statistics = None
        for layer in self._layers:
            x, statistics = layer(x, statistics)
        moments = self._conv_out(self._norm_out(x, statistics=statistics)).float()
        if self._conv_out.deferred_bias is not None:
            moments = moments + self._conv_out.deferred_bias
        mean, logvar = moments.permute(0, 3, 1, 2).chunk(2, dim=1)
        moments = torch.cat([mean, logvar.clamp(LOGVAR_MIN, LOGVAR_MAX)], dim=1)
        return moments.contiguous()


def _weights(layer: nn.Module) -> tuple[Tensor, Tensor]:
    assert isinstance(layer.weight, Tensor)
    assert isinstance(layer.bias, Tensor)
    return layer.weight, layer.bias


def _norm(
    norm: nn.Module, bias: Tensor | None, kernels: ModuleType, *, silu: bool
) -> Callable[..., Tensor]:
    """Return a function of a map and its statistics; `bias` is not added to the map yet."""
    assert isinstance(norm, nn.GroupNorm)
    return functools.partial(
        kernels.group_norm,
        bias=bias,
        weight=norm.weight,
        shift=norm.bias,
        num_groups=norm.num_groups,
        eps=norm.eps,
        silu=silu,
    )


class _Conv:
    """A convolution of [B, H, W, C], with stride 1 unless its input is already padded.

    `deferred_bias` is the bias that the next operation must add; None if the convolution adds it.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, target: _Target, *, is_padded: bool = False
    ) -> None:
        defers = target.kernels.FOLDS_BIAS
        self._weight = weight.to(target.dtype).contiguous(memory_format=torch.channels_last)
        self._bias = None if defers else bias.to(target.dtype)
        self.deferred_bias = bias if defers else None
        self._stride, self._padding = (2, 0) if is_padded else (1, weight.shape[2] // 2)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2)
        x = F.conv2d(x, self._weight, self._bias, self._stride, self._padding)
        return x.permute(0, 2, 3, 1).contiguous()  # copies only degenerate shapes


class _Resnet:
    """A residual block, and the halving convolution after it, if any."""

    def __init__(
        self, block: ResnetBlock, halve: Downsample | None, bias: Tensor | None, target: _Target
    ) -> None:
        self._kernels = target.kernels
        self._num_groups = block.norm1.num_groups
        self._norm1 = _norm(block.norm1, bias, target.kernels, silu=True)
        self._conv1 = _Conv(*_weights(block.conv1), target)
        self._norm2 = _norm(block.norm2, self._conv1.deferred_bias, target.kernels, silu=True)
        weight2, bias2 = _weights(block.conv2)
        self._shortcut: Tensor | None = None
        if isinstance(block.conv_shortcut, nn.Conv2d):
            matrix, shortcut_bias = _weights(block.conv_shortcut)
            matrix = matrix[:, :, 0, 0]
            self._shortcut = matrix.to(target.dtype).t()
            bias2 = bias2 + shortcut_bias
            if bias is not None:
                bias2, bias = bias2 + matrix @ bias, None
        self._conv2 = _Conv(weight2, bias2, target)
        self._bias = _add(self._conv2.deferred_bias, bias)
        self._halve = halve and _Conv(*_weights(halve.conv), target, is_padded=True)
        if self._halve:
            self.deferred_bias = self._halve.deferred_bias
        else:
            self.deferred_bias = self._bias if self._shortcut is not None else None

    def __call__(self, x: Tensor, statistics: Tensor | None) -> _Map:
        # Separate statements keep at most three maps alive at once.
        h = self._norm1(x, statistics=statistics)
        h = self._conv1(h)
        h = self._norm2(h, statistics=None)
        h = self._conv2(h)
        if self._shortcut is not None:
            h.view(-1, h.shape[3]).addmm_(x.view(-1, x.shape[3]), self._shortcut)
        if self._halve:
            other = None if self._shortcut is not None else x
            h = self._kernels.add_padded(h, other, self._bias)
            return self._halve(h), None
        if self._shortcut is not None:
            return h, None
        out: _Map = self._kernels.add(h, x, self._bias, self._num_groups)
        return out


class _Attention:
    """Self-attention with one head, added to its input."""

    def __init__(self, layer: Attention, bias: Tensor | None, target: _Target) -> None:
        self._kernels = target.kernels
        self._norm = _norm(layer.group_norm, bias, target.kernels, silu=False)
        q, k, v = layer.to_q, layer.to_k, layer.to_v
        scale = q.in_features**-0.5
        weights = [q.weight * scale, k.weight, v.weight]
        biases = [q.bias * scale, k.bias, torch.zeros_like(v.bias)]
        self._to_qkv = torch.cat(weights).to(target.dtype)
        self._qkv_bias = torch.cat(biases).to(target.dtype)
        out_weight, out_bias = _weights(layer.to_out[0])
        self._to_out = out_weight.to(target.dtype).t()
        self.deferred_bias = _add(out_bias + out_weight @ v.bias, bias)

    def __call__(self, x: Tensor, statistics: Tensor | None) -> _Map:
        batch, height, width, channels = x.shape
        tokens = self._norm(x, statistics=statistics).view(batch, height * width, channels)
        qkv = F.linear(tokens, self._to_qkv, self._qkv_bias)
        h: Tensor = self._kernels.attend(*qkv.chunk(3, dim=2))
        x.view(-1, channels).addmm_(h.reshape(-1, channels), self._to_out)
        return x, None


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
