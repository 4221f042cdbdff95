"""The encoder of `model.py`, optimised for the device: the same function with fused operations.

Weights are converted once, to the precision and to channels-last. All maps are [B, H, W, C], the
layout of tensor cores and of a CPU's vector units. `kernels.py` on a GPU and `plain.py` on a CPU
have the operations between the convolutions. Four optimisations do not change the function:

- On a GPU the bias of a convolution is added by the next operation that reads the map.
- The sum at the end of a residual block also computes the statistics of the next norm, or writes
  the row and column of zeros that the halving convolution needs.
- `quant_conv`, a 1×1 convolution, is multiplied into `conv_out` before it.
- The scale of attention is multiplied into `to_q`. The bias of `to_v` is added after `to_out`,
  which is equivalent because the weights of attention sum to one.

The tests compare this encoder with the reference `model.py`.
"""

from __future__ import annotations

import copy
import functools
import importlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentcache.errors import one_line
from latentcache.vae import plain
from latentcache.vae.model import (
    LOGVAR_MAX,
    LOGVAR_MIN,
    Attention,
    DownBlock,
    Downsample,
    KLAutoencoder,
    ResnetBlock,
    require_images,
)

Encode = Callable[[Tensor], Tensor]
"""Encodes uint8 [B, 3, H, W] to float32 moments [B, 2C, H/f, W/f], like `KLAutoencoder.encode`."""

_Map = tuple[Tensor, Tensor | None]  # [B, H, W, C], and its statistics by group if they are known


def fastest_encode(vae: KLAutoencoder, dtype: torch.dtype) -> Encode:
    """Return the fastest encode function for the VAE's device; it copies the weights.

    On a GPU without a working triton, which needs a C compiler, it is the reference itself.

    Args:
        vae: the VAE in fp32 on its device.
        dtype: the dtype of the computation.
    """
    if vae.device.type != "cuda":
        return FastEncoder(vae, dtype, plain)
    kernels = _working_kernels(vae.device)
    if isinstance(kernels, ModuleType):
        return FastEncoder(vae, dtype, kernels)
    return copy.deepcopy(vae).to(dtype).encode


def triton_version(device: torch.device) -> str | None:
    """Return the version of triton that `fastest_encode` uses on a device; None on a CPU.

    If triton cannot be used on a GPU, the result is `unusable: ` and the reason.
    """
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


class FastEncoder:
    """A VAE's encoder and `quant_conv`, with the interface of `KLAutoencoder.encode`.

    Args:
        vae: the VAE in fp32; its weights are converted once, on construction.
        dtype: the dtype of the computation.
        kernels: the module `kernels` or `plain`.
    """

    @torch.no_grad()
    def __init__(self, vae: KLAutoencoder, dtype: torch.dtype, kernels: ModuleType) -> None:
        self._kernels, self._dtype = kernels, dtype
        self._factor = vae.architecture.downsample_factor
        target = _Target(dtype, kernels)
        encoder, middle = vae.encoder, vae.encoder.mid_block
        self._conv_in = target.conv_in(encoder.conv_in)
        layers: list[nn.Module] = []
        for block in encoder.down_blocks:
            assert isinstance(block, DownBlock)
            layers += [*block.resnets, *block.downsamplers]
        layers += [middle.resnets[0], *middle.attentions, middle.resnets[1]]
        self._layers: list[_Resnet | _Attention | _Halving] = []
        bias = self._conv_in.left_bias
        for layer, following in zip(layers, [*layers[1:], None], strict=True):
            if isinstance(layer, ResnetBlock):
                halves = isinstance(following, Downsample)
                self._layers.append(_Resnet(layer, bias, target, pads=halves))
            elif isinstance(layer, Attention):
                self._layers.append(_Attention(layer, bias, target))
            else:
                assert isinstance(layer, Downsample)
                self._layers.append(_Halving(layer, target))
            bias = self._layers[-1].left_bias
        self._norm_out = target.norm(encoder.conv_norm_out, bias)
        self._conv_out = target.conv_out(encoder.conv_out, vae.quant_conv)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Encode uint8 [B, 3, H, W] to float32 moments [B, 2C, H/f, W/f]."""
        require_images(images, self._factor)
        x = self._conv_in(self._kernels.to_input(images, self._dtype))
        statistics = None
        for layer in self._layers:
            x, statistics = layer(x, statistics)
        moments = self._conv_out(self._norm_out(x, statistics, silu=True)).float()
        if self._conv_out.left_bias is not None:
            moments = moments + self._conv_out.left_bias
        mean, logvar = moments.permute(0, 3, 1, 2).chunk(2, dim=1)
        moments = torch.cat([mean, logvar.clamp(LOGVAR_MIN, LOGVAR_MAX)], dim=1)
        return moments.contiguous()


@dataclass(frozen=True, slots=True)
class _Target:
    """The target of the conversion of layers."""

    dtype: torch.dtype
    kernels: ModuleType

    def norm(self, norm: nn.Module, bias: Tensor | None) -> _Norm:
        assert isinstance(norm, nn.GroupNorm)
        return _Norm(norm, bias, self.kernels)

    def conv(self, conv: nn.Conv2d) -> _Conv:
        assert conv.bias is not None
        return _Conv(conv.weight, conv.bias, self)

    def conv_in(self, conv: nn.Conv2d) -> _Conv:
        """Convert the first convolution, for images with additional channels of zeros."""
        assert conv.bias is not None
        num_zeros = self.kernels.NUM_INPUT_CHANNELS - conv.in_channels
        return _Conv(F.pad(conv.weight, (0, 0, 0, 0, 0, num_zeros)), conv.bias, self)

    def conv_out(self, conv: nn.Conv2d, quant_conv: nn.Module) -> _Conv:
        """Convert the last convolution and `quant_conv` to one convolution.

        Args:
            conv: the last convolution.
            quant_conv: a 1×1 convolution, or the identity.
        """
        assert conv.bias is not None
        weight, bias = conv.weight, conv.bias
        if isinstance(quant_conv, nn.Conv2d):
            assert quant_conv.bias is not None
            matrix = quant_conv.weight[:, :, 0, 0]
            weight = torch.einsum("om,mihw->oihw", matrix, weight)
            bias = matrix @ bias + quant_conv.bias
        return _Conv(weight, bias, self)


class _Conv:
    """A convolution of [B, H, W, C], with stride 1 unless its input is already padded.

    `left_bias` is the bias that the next operation must add; None if the convolution adds it.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, target: _Target, *, is_padded: bool = False
    ) -> None:
        folds = target.kernels.FOLDS_BIAS
        self._weight = weight.to(target.dtype).contiguous(memory_format=torch.channels_last)
        self._bias = None if folds else bias.to(target.dtype)
        self.left_bias = bias if folds else None
        self._stride, self._padding = (2, 0) if is_padded else (1, weight.shape[2] // 2)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2)
        x = F.conv2d(x, self._weight, self._bias, self._stride, self._padding)
        return x.permute(0, 2, 3, 1).contiguous()  # copies only degenerate shapes


class _Norm:
    """A GroupNorm, optionally with SiLU, of a map whose bias may not be added yet."""

    def __init__(self, norm: nn.GroupNorm, bias: Tensor | None, kernels: ModuleType) -> None:
        self._norm, self._bias, self._kernels = norm, bias, kernels

    def __call__(self, x: Tensor, statistics: Tensor | None, *, silu: bool) -> Tensor:
        norm = self._norm
        out: Tensor = self._kernels.group_norm(
            x, self._bias, statistics, norm.weight, norm.bias, norm.num_groups, norm.eps, silu
        )
        return out


class _Resnet:
    """A residual block; `pads` adds the zeros that a halving convolution after it needs."""

    def __init__(
        self, block: ResnetBlock, bias: Tensor | None, target: _Target, *, pads: bool
    ) -> None:
        self._kernels, self._pads = target.kernels, pads
        self._num_groups = block.norm1.num_groups
        self._norm1 = target.norm(block.norm1, bias)
        self._conv1 = target.conv(block.conv1)
        self._norm2 = target.norm(block.norm2, self._conv1.left_bias)
        self._shortcut: Tensor | None = None
        assert block.conv2.bias is not None
        bias2 = block.conv2.bias
        if isinstance(block.conv_shortcut, nn.Conv2d):
            assert block.conv_shortcut.bias is not None
            matrix = block.conv_shortcut.weight[:, :, 0, 0]
            self._shortcut = matrix.to(target.dtype).t()
            bias2 = bias2 + block.conv_shortcut.bias
            if bias is not None:
                bias2, bias = bias2 + matrix @ bias, None
        self._conv2 = _Conv(block.conv2.weight, bias2, target)
        self._bias = _sum(self._conv2.left_bias, bias)
        self.left_bias = self._bias if self._shortcut is not None and not pads else None

    def __call__(self, x: Tensor, statistics: Tensor | None) -> _Map:
        # Separate statements keep at most three maps alive at once.
        h = self._norm1(x, statistics, silu=True)
        h = self._conv1(h)
        h = self._norm2(h, None, silu=True)
        h = self._conv2(h)
        if self._shortcut is not None:
            h.view(-1, h.shape[3]).addmm_(x.view(-1, x.shape[3]), self._shortcut)
        if self._pads:
            other = None if self._shortcut is not None else x
            return self._kernels.add_padded(h, other, self._bias), None
        if self._shortcut is not None:
            return h, None
        out: _Map = self._kernels.add(h, x, self._bias, self._num_groups)
        return out


class _Attention:
    """Self-attention with one head, added to its input."""

    def __init__(self, layer: Attention, bias: Tensor | None, target: _Target) -> None:
        self._kernels = target.kernels
        self._norm = target.norm(layer.group_norm, bias)
        q, k, v, out = layer.to_q, layer.to_k, layer.to_v, layer.to_out[0]
        assert isinstance(out, nn.Linear)
        scale = q.in_features**-0.5
        weights = [q.weight * scale, k.weight, v.weight]
        biases = [q.bias * scale, k.bias, torch.zeros_like(v.bias)]
        self._to_qkv = torch.cat(weights).to(target.dtype)
        self._qkv_bias = torch.cat(biases).to(target.dtype)
        self._to_out = out.weight.to(target.dtype).t()
        self.left_bias = _sum(out.bias + out.weight @ v.bias, bias)

    def __call__(self, x: Tensor, statistics: Tensor | None) -> _Map:
        batch, height, width, channels = x.shape
        tokens = self._norm(x, statistics, silu=False).view(batch, height * width, channels)
        qkv = F.linear(tokens, self._to_qkv, self._qkv_bias)
        h: Tensor = self._kernels.attend(*qkv.chunk(3, dim=2))
        x.view(-1, channels).addmm_(h.reshape(-1, channels), self._to_out)
        return x, None


class _Halving:
    """A convolution of stride 2 on a map that is already padded."""

    def __init__(self, layer: Downsample, target: _Target) -> None:
        assert layer.conv.bias is not None
        self._conv = _Conv(layer.conv.weight, layer.conv.bias, target, is_padded=True)
        self.left_bias = self._conv.left_bias

    def __call__(self, x: Tensor, statistics: Tensor | None) -> _Map:
        assert statistics is None
        return self._conv(x), None


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
