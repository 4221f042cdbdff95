"""The architecture of a KL autoencoder, read from a config.json and validated."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError

from latentcache.errors import CheckpointError

FAMILY = "AutoencoderKL"

# Far above any published autoencoder. Without limits, a config or a file could request a model of
# any size.
_MAX_BLOCKS, _MAX_LAYERS, _MAX_CHANNELS = 8, 32, 2**14

# The descriptions follow `field = value` in errors.
_Boolean = Annotated[bool, Field(strict=True, description="is neither true nor false")]
_Channels = Annotated[
    int,
    Field(
        strict=True,
        ge=1,
        le=_MAX_CHANNELS,
        description=f"is not a positive integer of at most {_MAX_CHANNELS}",
    ),
]
_Number = Annotated[float, Field(strict=True, gt=-(2.0**64), lt=2.0**64)]
_Numbers = Annotated[
    tuple[_Number, ...] | None, Field(description="is not a list of finite numbers")
]

_ENCODER_FIELDS = (
    "block_out_channels",
    "layers_per_block",
    "latent_channels",
    "norm_num_groups",
    "use_quant_conv",
    "mid_block_add_attention",
)


@dataclass(frozen=True, slots=True)
class Architecture:
    """The fields of a diffusers `config.json` of an `AutoencoderKL`, with diffusers' defaults.

    `force_upcast` is only the publisher's hint that float16 overflows. Latents are stored unscaled.
    Diffusion models expect `scaling_factor` and `shift_factor` (`(z - shift) * scale`) or the
    per-channel `latents_mean` and `latents_std` to be applied to them. `scaling_factor` is None if
    a file without a config does not determine it.
    """

    block_out_channels: Annotated[
        tuple[_Channels, ...],
        Field(
            min_length=1,
            max_length=_MAX_BLOCKS,
            description=f"is not a list of 1 to {_MAX_BLOCKS} positive integers of at most "
            f"{_MAX_CHANNELS}",
        ),
    ] = (64,)
    layers_per_block: Annotated[
        _Channels,
        Field(le=_MAX_LAYERS, description=f"is not a positive integer of at most {_MAX_LAYERS}"),
    ] = 1
    latent_channels: _Channels = 4
    norm_num_groups: _Channels = 32
    use_quant_conv: _Boolean = True
    use_post_quant_conv: _Boolean = True
    mid_block_add_attention: _Boolean = True
    scaling_factor: Annotated[_Number | None, Field(description="is not a finite number")] = 0.18215
    shift_factor: Annotated[_Number | None, Field(description="is not a finite number")] = None
    latents_mean: _Numbers = None
    latents_std: _Numbers = None
    force_upcast: _Boolean = True

    @property
    def downsample_factor(self) -> int:
        """Image pixels per latent pixel along one side. All blocks except the last halve it."""
        return int(2 ** (len(self.block_out_channels) - 1))

    @property
    def encoder_fields(self) -> dict[str, Any]:
        """The fields that determine the encoder, as plain JSON; others do not affect latents."""
        values = {field: getattr(self, field) for field in _ENCODER_FIELDS}
        return values | {"block_out_channels": list(self.block_out_channels)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], name: str = "config.json") -> Architecture:
        """Read a diffusers config.

        Args:
            config, name: the content of the config, and its name in errors.

        Raises:
            CheckpointError: the autoencoder is of another family, or a field has an unusable value.
        """

        def require(field: str, is_valid: bool, problem: str) -> None:
            if not is_valid:
                value = reprlib.repr(config.get(field))
                raise CheckpointError(f"{name}: {field} = {value} {problem}")

        is_family = config.get("_class_name", FAMILY) == FAMILY
        require("_class_name", is_family, f"is not supported: only {FAMILY} is")
        try:
            fields = {field: config[field] for field in get_type_hints(cls) if field in config}
            self = TypeAdapter(cls).validate_python(fields)
        except ValidationError as error:
            field = str(error.errors()[0]["loc"][0])
            hint = get_type_hints(cls, include_extras=True)[field]
            require(field, False, hint.__metadata__[-1].description)
        is_positive = self.scaling_factor is not None and self.scaling_factor > 0
        require("scaling_factor", is_positive, "is not a number above 0")
        num_blocks, num_groups = len(self.block_out_channels), self.norm_num_groups
        for field, known in (
            ("act_fn", "silu"),
            ("in_channels", 3),
            ("out_channels", 3),
            ("down_block_types", ["DownEncoderBlock2D"] * num_blocks),
            ("up_block_types", ["UpDecoderBlock2D"] * num_blocks),
        ):
            is_known = config.get(field, known) == known
            require(field, is_known, f"is not supported: only {known!r} is")
        has_groups = all(channels % num_groups == 0 for channels in self.block_out_channels)
        require("block_out_channels", has_groups, f"has no {num_groups} equal norm groups")
        for field in ("latents_mean", "latents_std"):
            numbers = getattr(self, field)
            has_all = numbers is None or len(numbers) == self.latent_channels
            require(field, has_all, "needs one value per latent channel")
        require("latents_std", min(self.latents_std or (1.0,)) > 0, "needs values above 0")
        return self
