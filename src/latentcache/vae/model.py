# ruff: noqa: D102  (what a forward takes and gives stands in its class's docstring)
"""The KL autoencoder of Stable Diffusion, SDXL, SD3 and FLUX, in plain PyTorch.

This is the eager reference: every faster path is measured against it. Modules and parameters carry
the names that diffusers' `AutoencoderKL` writes today, attention as linear layers (`to_q`, `to_k`,
`to_v`, `to_out.0`); these are the canonical names that `weights.py` maps every checkpoint onto and
that the encoder's fingerprint is taken over.

Architecture: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022),
appendix G; GroupNorm with eps 1e-6, SiLU, 3×3 convolutions, one attention head at the bottom.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentcache.errors import CheckpointError, ConfigError

FAMILY = "AutoencoderKL"

GROUP_NORM_EPS = 1e-6
# Far above any published autoencoder; a config or a file must not ask for a model without bound.
_MAX_BLOCKS, _MAX_LAYERS, _MAX_CHANNELS = 8, 32, 2**14

LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0  # diffusers' DiagonalGaussianDistribution clamps to these


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a diffusers `config.json` says of an `AutoencoderKL`; absent fields take its defaults.

    `force_upcast` is only the publisher's hint that float16 overflows. Latents are stored as the
    encoder gives them; `scaling_factor`, `shift_factor` (`(z - shift) * scale`) or the per-channel
    `latents_mean` and `latents_std` are what a diffusion model expects to be applied to them. A
    file without a config may not say its `scaling_factor`, which is None then.
    """

    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    scaling_factor: float | None = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True

    @property
    def downsample_factor(self) -> int:
        """Image pixels per latent pixel along one side: each block but the last halves the side."""
        return int(2 ** (len(self.block_out_channels) - 1))

    @property
    def encoder_fields(self) -> dict[str, Any]:
        """The fields that shape the encoder, as plain JSON; the others do not move a latent."""
        return {
            "block_out_channels": list(self.block_out_channels),
            "layers_per_block": self.layers_per_block,
            "latent_channels": self.latent_channels,
            "norm_num_groups": self.norm_num_groups,
            "use_quant_conv": self.use_quant_conv,
            "mid_block_add_attention": self.mid_block_add_attention,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], name: str = "config.json") -> Architecture:
        """Read a diffusers config; `name` is how errors call it.

        Raises:
            CheckpointError: another family of autoencoder, or a field with an unusable value.
        """
        fields = _Fields(config, name)
        fields.require_family()
        architecture = cls(
            block_out_channels=fields.integers("block_out_channels", (64,)),
            layers_per_block=fields.integer("layers_per_block", 1, _MAX_LAYERS),
            latent_channels=fields.integer("latent_channels", 4, _MAX_CHANNELS),
            norm_num_groups=fields.integer("norm_num_groups", 32, _MAX_CHANNELS),
            use_quant_conv=fields.boolean("use_quant_conv", True),
            use_post_quant_conv=fields.boolean("use_post_quant_conv", True),
            mid_block_add_attention=fields.boolean("mid_block_add_attention", True),
            scaling_factor=fields.positive("scaling_factor", 0.18215),
            shift_factor=fields.optional_number("shift_factor"),
            latents_mean=fields.optional_numbers("latents_mean"),
            latents_std=fields.optional_numbers("latents_std"),
            force_upcast=fields.boolean("force_upcast", True),
        )
        num_groups = architecture.norm_num_groups
        if any(channels % num_groups for channels in architecture.block_out_channels):
            raise fields.error("block_out_channels", f"has no {num_groups} equal norm groups")
        for field in ("latents_mean", "latents_std"):
            values = getattr(architecture, field)
            if values is not None and len(values) != architecture.latent_channels:
                raise fields.error(field, "needs one value per latent channel")
        if architecture.latents_std and min(architecture.latents_std) <= 0:
            raise fields.error("latents_std", "needs values above 0")
        return architecture


class _Fields:
    """Typed reads from a JSON object, each failure a CheckpointError that names the field."""

    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        self.config = config
        self.name = name

    def error(self, field: str, problem: str) -> CheckpointError:
        value = reprlib.repr(self.config.get(field))
        return CheckpointError(f"{self.name}: {field} = {value} {problem}")

    def require_family(self) -> None:
        """Refuse what is not an AutoencoderKL built from the blocks in this file."""
        if self.config.get("_class_name", FAMILY) != FAMILY:
            raise self.error("_class_name", "is not supported: only AutoencoderKL is")
        for field, known in (
            ("act_fn", "silu"),
            ("in_channels", 3),
            ("out_channels", 3),
        ):
            if self.config.get(field, known) != known:
                raise self.error(field, f"is not supported: only {known!r} is")
        num_blocks = len(self.integers("block_out_channels", (64,)))
        for field, block in (
            ("down_block_types", "DownEncoderBlock2D"),
            ("up_block_types", "UpDecoderBlock2D"),
        ):
            if self.config.get(field, [block] * num_blocks) != [block] * num_blocks:
                raise self.error(field, f"is not supported: only {num_blocks} of {block} is")

    def integer(self, field: str, default: int, largest: int) -> int:
        value = self.config.get(field, default)
        if type(value) is not int or value < 1:
            raise self.error(field, "is not a positive integer")
        if value > largest:
            raise self.error(field, f"is more than {largest}, the most that is supported")
        return value

    def integers(self, field: str, default: tuple[int, ...]) -> tuple[int, ...]:
        value = self.config.get(field, default)
        if (
            not isinstance(value, list | tuple)
            or not value
            or any(type(item) is not int or item < 1 for item in value)
        ):
            raise self.error(field, "is not a list of positive integers")
        if len(value) > _MAX_BLOCKS or max(value) > _MAX_CHANNELS:
            raise self.error(
                field, f"is not supported: at most {_MAX_BLOCKS} of at most {_MAX_CHANNELS} are"
            )
        return tuple(value)

    def boolean(self, field: str, default: bool) -> bool:
        value = self.config.get(field, default)
        if not isinstance(value, bool):
            raise self.error(field, "is neither true nor false")
        return value

    def number(self, field: str, default: float) -> float:
        return self._finite(field, self.config.get(field, default), "is not a number")

    def positive(self, field: str, default: float) -> float:
        value = self.number(field, default)
        if value <= 0:
            raise self.error(field, "is not above 0")
        return value

    def optional_number(self, field: str) -> float | None:
        return None if self.config.get(field) is None else self.number(field, 0.0)

    def optional_numbers(self, field: str) -> tuple[float, ...] | None:
        value = self.config.get(field)
        if value is None:
            return None
        if not isinstance(value, list):
            raise self.error(field, "is not a list of numbers")
        return tuple(self._finite(field, item, "is not a list of numbers") for item in value)

    def _finite(self, field: str, value: object, problem: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(field, problem)
        # An integer that no float holds is as little use as infinity.
        if not math.isfinite(value) if isinstance(value, float) else abs(value) > 2**64:
            raise self.error(field, "is not finite")
        return float(value)


def _norm(num_groups: int, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups, channels, eps=GROUP_NORM_EPS)


class ResnetBlock(nn.Module):
    """Two pre-activated 3×3 convolutions around a shortcut, which is 1×1 if channels change."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(num_groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(num_groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = (
            nn.Identity()
            if in_channels == out_channels
            else nn.Conv2d(in_channels, out_channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        out: Tensor = self.conv_shortcut(x) + h
        return out


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
        out: Tensor = x + self.to_out(h).squeeze(1).transpose(1, 2).reshape(x.shape)
        return out


class MidBlock(nn.Module):
    """A residual block, attention if the architecture has it, and a residual block."""

    def __init__(self, channels: int, num_groups: int, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, num_groups) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels, num_groups)] if attention else [])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        out: Tensor = self.resnets[1](x)
        return out


class Downsample(nn.Module):
    """Halve the side by a strided convolution, padded at the right and bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Double the side by nearest neighbours and a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class DownBlock(nn.Module):
    """Residual blocks at one size of the encoder, then a halving unless it is the last."""

    def __init__(
        self, in_channels: int, out_channels: int, *, num_layers: int, num_groups: int, last: bool
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, num_groups)
            for i in range(num_layers)
        )
        self.downsamplers = nn.ModuleList([] if last else [Downsample(out_channels)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpBlock(nn.Module):
    """Residual blocks at one size of the decoder, then a doubling unless it is the last."""

    def __init__(
        self, in_channels: int, out_channels: int, *, num_layers: int, num_groups: int, last: bool
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, num_groups)
            for i in range(num_layers)
        )
        self.upsamplers = nn.ModuleList([] if last else [Upsample(out_channels)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class Encoder(nn.Module):
    """[B, 3, H, W] in [-1, 1] -> [B, 2C, H/f, W/f], before `quant_conv`."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        widths, groups = arch.block_out_channels, arch.norm_num_groups
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(
                widths[max(i - 1, 0)],
                width,
                num_layers=arch.layers_per_block,
                num_groups=groups,
                last=i == len(widths) - 1,
            )
            for i, width in enumerate(widths)
        )
        self.mid_block = MidBlock(widths[-1], groups, arch.mid_block_add_attention)
        self.conv_norm_out = _norm(groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * arch.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return out


class Decoder(nn.Module):
    """[B, C, h, w] after `post_quant_conv` -> [B, 3, f*h, f*w], about [-1, 1]."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        widths, groups = arch.block_out_channels[::-1], arch.norm_num_groups
        self.conv_in = nn.Conv2d(arch.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, arch.mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            UpBlock(
                widths[max(i - 1, 0)],
                width,
                num_layers=arch.layers_per_block + 1,
                num_groups=groups,
                last=i == len(widths) - 1,
            )
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = _norm(groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return out


class KLAutoencoder(nn.Module):
    """An encoder from images to the moments of a diagonal Gaussian, and a decoder back.

    Args:
        architecture: the sizes.
        decoder: False leaves the decoder out, for a job that only encodes.
    """

    def __init__(self, architecture: Architecture, *, decoder: bool = True) -> None:
        super().__init__()
        self.architecture = architecture
        channels = architecture.latent_channels
        self.encoder = Encoder(architecture)
        self.quant_conv = (
            nn.Conv2d(2 * channels, 2 * channels, 1)
            if architecture.use_quant_conv
            else nn.Identity()
        )
        self.decoder = Decoder(architecture) if decoder else None
        self.post_quant_conv = (
            nn.Conv2d(channels, channels, 1)
            if decoder and architecture.use_post_quant_conv
            else nn.Identity()
        )

    @property
    def dtype(self) -> torch.dtype:
        """What the modules compute in."""
        return self.encoder.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the modules lie; inputs must lie there too."""
        return self.encoder.conv_in.weight.device

    def encode(self, images: Tensor) -> Tensor:
        """Encode images to the posterior's moments.

        Args:
            images: uint8 [B, 3, H, W], RGB; H and W multiples of `downsample_factor`.

        Returns:
            float32 [B, 2C, H/f, W/f]: the mean, then the log-variance clamped to [-30, 20]. Neither
            is scaled.

        Raises:
            ConfigError: another dtype or shape.
        """
        require_images(images, self.architecture.downsample_factor)
        x = (images.float() / 127.5 - 1.0).to(self.dtype)
        moments = self.quant_conv(self.encoder(x)).float()
        mean, logvar = moments.chunk(2, dim=1)
        return torch.cat([mean, logvar.clamp(LOGVAR_MIN, LOGVAR_MAX)], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode unscaled latents to images.

        Args:
            latents: [B, C, h, w], as `encode` gives them: not scaled, not shifted.

        Returns:
            float32 [B, 3, f*h, f*w] in [-1, 1]; `to_uint8` makes pixels of it.

        Raises:
            ConfigError: another shape, or the VAE was loaded without its decoder.
        """
        if self.decoder is None:
            raise ConfigError("this VAE was loaded without its decoder: load it with decoder=True")
        channels = self.architecture.latent_channels
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise ConfigError(f"decode wants [B, {channels}, h, w], not {list(latents.shape)}")
        x = self.decoder(self.post_quant_conv(latents.to(self.dtype)))
        out: Tensor = x.float().clamp(-1.0, 1.0)
        return out


def require_images(images: Tensor, factor: int) -> None:
    """Refuse what is not a batch of images whose sides an encoder can divide by `factor`.

    Raises:
        ConfigError: not uint8 [B, 3, H, W], or H or W is no multiple of `factor`.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        shape = list(images.shape)
        raise ConfigError(f"encode wants uint8 [B, 3, H, W], not {images.dtype} {shape}")
    height_px, width_px = images.shape[2:]
    if min(height_px, width_px) < factor or height_px % factor or width_px % factor:
        raise ConfigError(
            f"encode wants sides that are multiples of {factor} px, not {width_px}x{height_px}"
        )


def to_uint8(images: Tensor) -> Tensor:
    """Turn [-1, 1] into uint8 pixels, rounded to the nearest level, on the same device."""
    return ((images.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
