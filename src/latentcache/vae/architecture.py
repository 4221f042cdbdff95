"""The architecture of a KL autoencoder, read from a config.json and validated."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from latentcache.errors import CheckpointError

FAMILY = "AutoencoderKL"

# Far above any published autoencoder. Without limits, a config or a file could request a model of
# any size.
_MAX_BLOCKS, _MAX_LAYERS, _MAX_CHANNELS = 8, 32, 2**14


@dataclass(frozen=True, slots=True)
class Architecture:
    """The fields of a diffusers `config.json` of an `AutoencoderKL`, with diffusers' defaults.

    `force_upcast` is only the publisher's hint that float16 overflows. Latents are stored unscaled.
    Diffusion models expect `scaling_factor` and `shift_factor` (`(z - shift) * scale`) or the
    per-channel `latents_mean` and `latents_std` to be applied to them. `scaling_factor` is None if
    a file without a config does not determine it.
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
        """Image pixels per latent pixel along one side. All blocks except the last halve it."""
        return int(2 ** (len(self.block_out_channels) - 1))

    @property
    def encoder_fields(self) -> dict[str, Any]:
        """The fields that determine the encoder, as plain JSON; others do not affect latents."""
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
        """Read a diffusers config.

        Args:
            config: the content of the config.
            name: the name of the config in errors.

        Raises:
            CheckpointError: the autoencoder is of another family, or a field has an unusable value.
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
    """Typed reads from a JSON object; a failure raises a CheckpointError that names the field."""

    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        self.config = config
        self.name = name

    def error(self, field: str, problem: str) -> CheckpointError:
        value = reprlib.repr(self.config.get(field))
        return CheckpointError(f"{self.name}: {field} = {value} {problem}")

    def require_family(self) -> None:
        """Raise an error if the config is not an AutoencoderKL with the blocks of `model.py`."""
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
            raise self.error(field, f"is more than {largest}, the supported maximum")
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
        # An integer that does not fit into a float is as unusable as infinity.
        if not math.isfinite(value) if isinstance(value, float) else abs(value) > 2**64:
            raise self.error(field, "is not finite")
        return float(value)
