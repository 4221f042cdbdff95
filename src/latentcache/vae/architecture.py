"""The architecture of a KL autoencoder, read from a config.json, and its scaling factor."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from latentcache.config import Vae
from latentcache.errors import CheckpointError, ConfigError

FAMILY = "AutoencoderKL"

# Far above any published autoencoder. A config could otherwise request a model of any size.
_MAX_BLOCKS, _MAX_LAYERS, _MAX_CHANNELS = 8, 32, 2**14

_USUAL = (
    "0.18215 for Stable Diffusion 1 and 2 and sd-vae-ft-*; 0.13025 for SDXL; 1.5305 with "
    "vae.shift_factor 0.0609 for SD3; 0.3611 with vae.shift_factor 0.1159 for FLUX.1"
)

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
    Diffusion models expect `(z - shift_factor) * scaling_factor`, or the per-channel `latents_mean`
    and `latents_std`. `scaling_factor` is None if a file without a config does not determine it.
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
        values = {field: getattr(self, field) for field in _ENCODER_FIELDS}
        return values | {"block_out_channels": list(self.block_out_channels)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], name: str = "config.json") -> Architecture:
        """Read a diffusers config; raise `CheckpointError` if it is not usable.

        Args:
            config, name: the content of the config, and its name in errors.
        """

        def require(field: str, is_valid: bool, problem: str) -> None:
            if not is_valid:
                value = reprlib.repr(config.get(field))
                raise CheckpointError(f"{name}: {field} = {value} {problem}")

        is_family = config.get("_class_name", FAMILY) == FAMILY
        require("_class_name", is_family, f"is not supported: only {FAMILY} is")
        values: dict[str, Any] = {}
        for fields, convert, problem in _READERS:
            for field in fields:
                if field in config and (config[field] is not None or field not in _OPTIONAL):
                    values[field] = convert(config[field])
                    require(field, values[field] is not None, problem)
        self = cls(**values)
        require("scaling_factor", values.get("scaling_factor", 1.0) > 0, "is not above 0")
        num_blocks, num_groups = len(self.block_out_channels), self.norm_num_groups
        is_short = num_blocks <= _MAX_BLOCKS
        require("block_out_channels", is_short, f"has more than {_MAX_BLOCKS} values")
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


def _integer(value: object, largest: int = _MAX_CHANNELS) -> int | None:
    return value if type(value) is int and 1 <= value <= largest else None


def _number(value: Any) -> float | None:
    """Return a finite number as a float, which may not hold larger integers."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 2**64 else None


def _items(value: Any, convert: Callable[[Any], Any]) -> tuple[Any, ...] | None:
    items = tuple(map(convert, value)) if isinstance(value, list | tuple) else (None,)
    return None if None in items else items


_OPTIONAL = ("shift_factor", "latents_mean", "latents_std")
_COUNT = "is not a positive integer of at most"
# Fields, a function that returns None for a value that is not valid, and the problem with it.
_READERS: tuple[tuple[tuple[str, ...], Callable[[Any], Any], str], ...] = (
    (
        ("block_out_channels",),
        lambda value: _items(value, _integer) or None,
        f"is not a list of positive integers of at most {_MAX_CHANNELS}",
    ),
    (("layers_per_block",), lambda v: _integer(v, _MAX_LAYERS), f"{_COUNT} {_MAX_LAYERS}"),
    (("latent_channels", "norm_num_groups"), _integer, f"{_COUNT} {_MAX_CHANNELS}"),
    (
        ("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention", "force_upcast"),
        lambda value: value if isinstance(value, bool) else None,
        "is neither true nor false",
    ),
    (("scaling_factor", "shift_factor"), _number, "is not a number that is finite"),
    (
        ("latents_mean", "latents_std"),
        lambda value: _items(value, _number),
        "is not a list of finite numbers",
    ),
)


def resolve_scaling(architecture: Architecture, vae: Vae) -> tuple[float, float]:
    """Return the scaling factor and the shift factor; raise `ConfigError` unless they are clear.

    Args:
        architecture, vae: of the checkpoint, and the section `vae` of the config.
    """
    known = architecture.scaling_factor
    if known is None:
        if vae.scaling_factor is None:
            raise ConfigError(
                f"{vae.checkpoint} has no scaling factor: set vae.scaling_factor ({_USUAL}), or "
                "put the config.json of its diffusers version beside it"
            )
        return vae.scaling_factor, vae.shift_factor or 0.0
    factors = {"scaling_factor": known, "shift_factor": architecture.shift_factor or 0.0}
    for field, actual in factors.items():
        given = getattr(vae, field)
        if given is not None and given != actual:
            raise ConfigError(
                f"vae.{field} is {given:g}, but that of {vae.checkpoint} is {actual:g}: leave "
                "vae.scaling_factor and vae.shift_factor out, or correct its config.json"
            )
    return known, factors["shift_factor"]
