# ruff: noqa: D102  (the docstring of a class describes its `forward`)
# mypy: disable-error-code="no-any-return"
"""The KL autoencoder of Stable Diffusion, SDXL, SD3 and FLUX (Rombach et al., 2022, appendix G).

This is the eager reference, with which every faster implementation is compared. Parameters have the
names of diffusers' current `AutoencoderKL`, over which the encoder's fingerprint is computed.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentcache.dataset.contract import VaeContract
from latentcache.errors import ConfigError
from latentcache.metrics import drift_db
from latentcache.vae.architecture import Architecture

LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0  # diffusers' DiagonalGaussianDistribution clamps to these

# Copies of one encoder in other precisions agree at least this well, such as those of the three
# decoders on the `sd-vae-ft-mse` model card. Separately trained autoencoders do not.
MIN_AGREEMENT_DB = 50.0


def _norm(num_groups: int, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """Two pre-activated 3×3 convolutions and a shortcut, which is a 1×1 convolution if needed."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(num_groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(num_groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        is_same = in_channels == out_channels
        self.conv_shortcut = nn.Identity() if is_same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class Attention(nn.Module):
    """Self-attention with one head over all positions of a feature map."""

    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__()
        self.group_norm = _norm(num_groups, channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2).unsqueeze(1)  # [B, 1, H*W, C]
        h = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + self.to_out(h).squeeze(1).transpose(1, 2).reshape(x.shape)


class MidBlock(nn.Module):
    """A residual block, attention if the architecture has it, and a residual block."""

    def __init__(self, channels: int, num_groups: int, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, num_groups) for _ in range(2))
        self.attentions = nn.Sequential(*[Attention(channels, num_groups)] if attention else [])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions(self.resnets[0](x)))


class Downsample(nn.Module):
    """A strided convolution that halves the sides; it pads only at the right and the bottom."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


def _upsample(channels: int) -> nn.Module:
    """Return nearest-neighbour upsampling that doubles the sides, then a convolution."""
    conv = nn.Conv2d(channels, channels, 3, padding=1)
    return nn.Sequential(OrderedDict(enlarge=nn.Upsample(scale_factor=2.0), conv=conv))


def _blocks(
    widths: Sequence[int],
    num_layers: int,
    num_groups: int,
    name: str,
    resample: Callable[[int], nn.Module],
) -> nn.Sequential:
    """Return residual blocks at each width; all except the last end with a layer `<name>.0`."""
    blocks = nn.Sequential()
    for index, width in enumerate(widths):
        channels = [widths[max(index - 1, 0)]] + [width] * num_layers
        resnets = [ResnetBlock(*pair, num_groups) for pair in itertools.pairwise(channels)]
        last = [resample(width)] if index < len(widths) - 1 else []
        parts = {"resnets": nn.Sequential(*resnets), name: nn.Sequential(*last)}
        blocks.append(nn.Sequential(OrderedDict(parts)))
    return blocks


def _encoder(arch: Architecture) -> nn.Sequential:
    """Return the encoder: [B, 3, H, W] in [-1, 1] -> [B, 2C, H/f, W/f], before `quant_conv`."""
    widths, groups = arch.block_out_channels, arch.norm_num_groups
    layers = OrderedDict[str, nn.Module](
        conv_in=nn.Conv2d(3, widths[0], 3, padding=1),
        down_blocks=_blocks(widths, arch.layers_per_block, groups, "downsamplers", Downsample),
        mid_block=MidBlock(widths[-1], groups, arch.mid_block_add_attention),
        conv_norm_out=_norm(groups, widths[-1]),
        conv_act=nn.SiLU(),
        conv_out=nn.Conv2d(widths[-1], 2 * arch.latent_channels, 3, padding=1),
    )
    return nn.Sequential(layers)


def _decoder(arch: Architecture) -> nn.Sequential:
    """Return the decoder: [B, C, h, w] after `post_quant_conv` -> [B, 3, f*h, f*w]."""
    widths, groups = arch.block_out_channels[::-1], arch.norm_num_groups
    layers = OrderedDict[str, nn.Module](
        conv_in=nn.Conv2d(arch.latent_channels, widths[0], 3, padding=1),
        mid_block=MidBlock(widths[0], groups, arch.mid_block_add_attention),
        up_blocks=_blocks(widths, arch.layers_per_block + 1, groups, "upsamplers", _upsample),
        conv_norm_out=_norm(groups, widths[-1]),
        conv_act=nn.SiLU(),
        conv_out=nn.Conv2d(widths[-1], 3, 3, padding=1),
    )
    return nn.Sequential(layers)


class KLAutoencoder(nn.Module):
    """An encoder from images to the moments of a diagonal Gaussian, and its decoder if needed."""

    def __init__(self, architecture: Architecture, *, decoder: bool = True) -> None:
        super().__init__()
        self.architecture = architecture
        channels = architecture.latent_channels
        self.encoder = _encoder(architecture)
        has_conv, has_post_conv = architecture.use_quant_conv, architecture.use_post_quant_conv
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1) if has_conv else nn.Identity()
        self.decoder = _decoder(architecture) if decoder else None
        self.post_quant_conv = (
            nn.Conv2d(channels, channels, 1) if decoder and has_post_conv else nn.Identity()
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the computation."""
        return next(self.encoder.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """The device of the modules; inputs must be on it."""
        return next(self.encoder.parameters()).device

    def encode(self, images: Tensor) -> Tensor:
        """Encode images, uint8 [B, 3, H, W], to the posterior's moments.

        Returns:
            float32 [B, 2C, H/f, W/f]: the unscaled mean, then the log-variance in [-30, 20].

        Raises:
            ConfigError: another dtype or shape, or sides that are no multiples of
                `downsample_factor`.
        """
        require_images(images, self.architecture.downsample_factor)
        x = (images.float() / 127.5 - 1.0).to(self.dtype)
        moments = self.quant_conv(self.encoder(x)).float()
        mean, logvar = moments.chunk(2, dim=1)
        return torch.cat([mean, logvar.clamp(LOGVAR_MIN, LOGVAR_MAX)], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents [B, C, h, w] as from `encode`, neither scaled nor shifted.

        Returns:
            float32 [B, 3, f*h, f*w] in [-1, 1]; `to_uint8` converts it to pixels.

        Raises:
            ConfigError: `latents` has another shape, or the VAE was loaded without its decoder.
        """
        if self.decoder is None:
            raise ConfigError("this VAE was loaded without its decoder: load it with decoder=True")
        channels = self.architecture.latent_channels
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise ConfigError(f"decode needs [B, {channels}, h, w], not {list(latents.shape)}")
        x = self.decoder(self.post_quant_conv(latents.to(self.dtype)))
        return x.float().clamp(-1.0, 1.0)


def require_images(images: Tensor, factor: int) -> None:
    """Raise `ConfigError` unless a tensor is a batch of images that an encoder accepts.

    Args:
        images, factor: uint8 [B, 3, H, W]; and the required divisor of H and W.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        shape = list(images.shape)
        raise ConfigError(f"encode needs uint8 [B, 3, H, W], not {images.dtype} {shape}")
    height_px, width_px = images.shape[2:]
    if min(height_px, width_px) < factor or height_px % factor or width_px % factor:
        raise ConfigError(
            f"encode needs sides that are multiples of {factor} px, not {width_px}x{height_px}"
        )


def to_uint8(images: Tensor) -> Tensor:
    """Convert [-1, 1] to uint8 pixels, rounded to the nearest level, on the same device."""
    return ((images.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def require_family(vae: KLAutoencoder, name: str, other: Architecture | VaeContract) -> None:
    """Raise `ConfigError` if the latents of a VAE have another shape than the latents to decode.

    Args:
        vae, name, other: the VAE, its name in errors, and the VAE of the latents to decode.
    """
    for field in ("latent_channels", "downsample_factor"):
        given, value = getattr(vae.architecture, field), getattr(other, field)
        if given != value:
            raise ConfigError(
                f"{name} is of another family: its {field} is {given}, that of the latents is "
                f"{value}: name a decoder of the same VAE"
            )


def require_agreement(own: Tensor, latents: Tensor, name: str) -> float:
    """Return the agreement in dB of two encoders; raise `ConfigError` below `MIN_AGREEMENT_DB`.

    Args:
        own, latents, name: both latents of some images, [B, C, h, w], and the VAE's name in errors.
    """
    agreement_db = drift_db(own, latents)
    if agreement_db < MIN_AGREEMENT_DB:
        raise ConfigError(
            f"{name} belongs to another encoder: on the first images the two agree to "
            f"{agreement_db:.1f} dB, and {MIN_AGREEMENT_DB:g} dB are required: name a decoder of "
            "the same VAE"
        )
    return agreement_db
