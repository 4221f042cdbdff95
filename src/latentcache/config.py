"""The configs: what `latentcache run` and `latentcache eval` read, check and refuse.

Each section is a frozen Pydantic model, so that a config is valid as a whole before anything
starts. Credentials never stand in a config: they come from the environment or a named profile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from latentcache.config_files import parse_tree, read_config
from latentcache.config_types import OutputUrl, PublicText, Section, Side, Storage, Url
from latentcache.errors import ConfigError
from latentcache.storage_options import StorageOptions

# Names that every row has already; a kept field may not take one.
ROW_COLUMNS = (
    "key",
    "latent",
    "latent_shape",
    "latent_dtype",
    "original_width",
    "original_height",
    "crop_top",
    "crop_left",
)

# Larger images are refused before they are decoded, where a config does not say otherwise.
MAX_PIXELS = 100_000_000


class Images(Section):
    """Which images are read."""

    shards: Url | list[Url] | None = Field(
        None,
        description="WebDataset tars or Parquet files: a URL, with brace ranges or a glob, or a "
        "list of such URLs.",
    )
    folder: Url | None = Field(
        None, description="A folder of image files, in place of shards: its URL."
    )
    image: list[str] = Field(
        [
            *("jpg", "jpeg", "png", "webp", "avif", "gif"),
            *("bmp", "tif", "tiff", "jxl", "heic", "heif", "image"),
        ],
        min_length=1,
        description="Fields that hold the image: file name endings, in any case, or columns of "
        "Parquet files.",
    )
    key: str | None = Field(
        None, description="Column of Parquet files with the key; the image's path if left out."
    )
    caption_index: int = Field(
        0, ge=0, description="Element that is kept where a text column of Parquet holds lists."
    )
    max_sample_bytes: int = Field(
        256 * 2**20,
        ge=1,
        le=2**31 - 1,
        description="Reject a sample whose fields together hold more bytes, before reading them.",
    )
    storage: Storage = StorageOptions()

    @field_validator("image")
    @classmethod
    def _endings_are_plain(cls, image: list[str]) -> list[str]:
        plain = [name.removeprefix(".") for name in image]
        for name in plain:
            if not name or "*" in name or "/" in name:
                raise ValueError(
                    f"{name!r} is no ending of a file name: write it without '*' and '/', such as "
                    "'jpg'"
                )
        if len(set(plain)) < len(plain):
            raise ValueError("names a field twice")
        return plain

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        if (self.shards is None) == (self.folder is None):
            raise ValueError("name either `shards` or `folder`")
        if self.key is not None and self.shards is None:
            raise ValueError("`key` names a column of Parquet files, and goes with `shards`")
        return self


class Source(Images):
    """Which images are read, and what is kept of their samples."""

    keep: list[str] = Field(
        [], description="Fields kept as columns: text, `cls` as integer; `txt` becomes `caption`."
    )
    num_units: int | None = Field(
        None,
        ge=1,
        le=65536,
        description="Units that a folder is cut into; 64 if left out. It stays as it was at first.",
    )
    moved_from: Url | None = Field(
        None,
        description="The folder in which the source lay before it moved: what the output has of it "
        "stays, under the old URLs, and only what is new is encoded.",
    )
    on_missing: Literal["keep", "drop"] = Field(
        "keep", description="Whether rows stay when their shard is no longer listed."
    )

    @field_validator("keep")
    @classmethod
    def _keep_names_are_free(cls, keep: list[str]) -> list[str]:
        for name in keep:
            if name in ROW_COLUMNS:
                raise ValueError(f"{name!r} is a column of every row already")
        if len(set(keep)) < len(keep):
            raise ValueError("names a field twice")
        if {"txt", "caption"} <= set(keep):
            raise ValueError("`txt` and `caption` would both be the column `caption`")
        return keep

    @model_validator(mode="after")
    def _only_folders_are_cut(self) -> Self:
        if self.num_units is not None and self.folder is None:
            raise ValueError("`num_units` goes with `folder`: a shard is a unit by itself")
        return self


class RatioBuckets(Section):
    """Aspect-ratio buckets of about `resolution_px` squared pixels."""

    max_ratio: float = Field(ge=1.0, le=16.0, description="Longest side over shortest, at most.")
    step_px: Side = Field(64, description="Sides are multiples of this.")


class Transform(Section):
    """How an image becomes the pixels that are encoded."""

    resolution_px: Side
    crop: Literal["center"] = "center"
    resample: Literal["bicubic"] = "bicubic"
    buckets: RatioBuckets | list[tuple[Side, Side]] | None = Field(
        None, description="[width, height] sizes, or a rule; none means one square."
    )
    min_side_px: int | None = Field(None, ge=1, description="Reject images with a shorter side.")
    max_upscale: float | None = Field(
        None, gt=0, description="Reject images that would be enlarged by more than this factor."
    )
    max_pixels: int = Field(
        MAX_PIXELS, ge=1, description="Reject images of more pixels, before decoding them."
    )
    dct_scaling: bool = Field(
        False,
        description="Decode a JPEG at 1/2, 1/4 or 1/8 of its size where that is still twice the "
        "size wanted: faster for large photographs, and about 48 dB from the full decode.",
    )

    @field_validator("buckets")
    @classmethod
    def _buckets_are_distinct(cls, buckets: Any) -> Any:
        if isinstance(buckets, list) and not buckets:
            raise ValueError("names no size; leave it out for one square")
        if isinstance(buckets, list) and len(set(buckets)) < len(buckets):
            raise ValueError("names a size twice")
        return buckets


class Autoencoder(Section):
    """An autoencoder; it has no default, because latents of different ones do not mix."""

    checkpoint: Url = Field(
        description="A diffusers folder, a single-file or CompVis checkpoint, by path or URL; "
        "`demo` is the small one in this package, whose latents are not Stable Diffusion's."
    )
    storage: Storage = StorageOptions()


class Vae(Autoencoder):
    """The autoencoder that encodes, and the numbers that a model needs to use its latents."""

    scaling_factor: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Needed where the checkpoint does not say it: a lone CompVis file. 0.18215 for "
        "Stable Diffusion 1 and 2 and sd-vae-ft-*, 0.13025 for SDXL, 1.5305 for SD3, 0.3611 for "
        "FLUX.1.",
    )
    shift_factor: float | None = Field(
        None,
        allow_inf_nan=False,
        description="Goes with `scaling_factor`: 0.0609 for SD3, 0.1159 for FLUX.1, else 0.",
    )


class Calibration(Section):
    """On what int8's range is measured, channel by channel, before a first run."""

    num_images: int = Field(512, ge=1, le=8192, description="At most, from several shards.")
    seed: int = Field(0, ge=0, description="Chooses other shards.")


class Latents(Section):
    """What is stored."""

    posterior: Literal["mean", "moments", "sample"] = "mean"
    dtype: Literal["float16", "bfloat16", "float32", "int8"] = Field(
        "float16",
        description="int8 takes half the bytes of float16, at a latent SNR of 35 to 40 dB.",
    )
    format: Literal["parquet", "safetensors"] = "parquet"
    calibration: Calibration | None = Field(None, description="Of int8; the defaults if left out.")

    @field_validator("calibration")
    @classmethod
    def _calibration_goes_with_int8(
        cls, calibration: Calibration | None, info: ValidationInfo
    ) -> Calibration | None:
        if calibration and info.data.get("dtype", "int8") != "int8":
            raise ValueError(f"goes with dtype int8, not with {info.data['dtype']}")
        return calibration


class Output(Section):
    """Where the dataset is written."""

    url: OutputUrl
    storage: Storage = StorageOptions()


class Rejects(Section):
    """How many samples may be left out."""

    max_rate: float = Field(
        0.02,
        ge=0,
        le=1,
        description="Of the dataset's samples; judged at the end, and from 1,000 on while it runs.",
    )


class Compute(Section):
    """What the run may use."""

    num_gpus: int = Field(1, ge=0, description="One actor each; 0 encodes on CPUs.")
    num_cpu_actors: int = Field(1, ge=1, description="Actors where `num_gpus` is 0.")
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    decode_threads: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="Per actor; also the CPUs that the actor asks Ray for."
    )
    unit_retries: int = Field(3, ge=0, description="Tries after the first, before a unit fails.")
    preemption_retries: int = Field(
        20, ge=0, description="The same for a unit whose node was taken away under it."
    )
    on_busy: Literal["join", "skip", "wait"] = Field(
        "join",
        description="While another run works on the output: work beside it, do nothing, or wait.",
    )
    wait_for_gpus_s: float = Field(
        0.0, ge=0, description="For a GPU to appear, in a cluster that has none yet."
    )
    precision: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        "auto", description="auto: the fastest whose first batch stays 55 dB from fp32."
    )


class Network(Section):
    """A published network that a measure needs; the file counts only with this hash."""

    url: Url = Field(description="A path or URL.")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="Of the file, lower-case hex.")


class Qa(Section):
    """A look at a sample of rows while they are made; leave it out for none."""

    fraction: float = Field(0.001, ge=0, le=1, description="Of all rows.")
    min_rows_per_bucket: int = Field(8, ge=0, description="More where that is fewer.")
    seed: int = Field(0, ge=0, description="Draws other rows.")
    decoder: Url | None = Field(
        None, description="A checkpoint whose decoder is used; `vae.checkpoint` if left out."
    )
    lpips: Network | None = Field(
        None, description="StyleGAN2-ADA's `vgg16.pt`; without it LPIPS is not measured."
    )
    storage: Storage = Field(StorageOptions(), description="Of the decoder and the network.")
    min_psnr_db: float | None = Field(15.0, description="Gate: the mean over QA rows, at least.")
    min_drift_db: float | None = Field(
        30.0, description="Gate: every stored latent against an fp32 encode, at least."
    )
    max_rejects: int | None = Field(None, ge=0, description="Gate: samples left out, at most.")


class Config(Section):
    """A whole config file."""

    name: PublicText = Field(min_length=1)
    source: Source
    transform: Transform
    vae: Vae
    latents: Latents = Latents()
    output: Output
    rejects: Rejects = Rejects()
    compute: Compute = Compute()
    qa: Qa | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_mapping(cls, value: Any) -> Any:
        if not isinstance(value, Mapping | Config):
            raise ValueError("a config is a mapping with `source`, `transform`, `vae`, `output`")
        return value


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read the YAML config of a run.

    Args:
        path: the file.
        overrides: `a.b=c` settings that replace single values; `c` is read as YAML.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or a value is wrong; the message has one
            line per mistake with its dotted path and, for an unknown name, the nearest valid one.
    """
    return read_config(Config, path, overrides)


def parse_config(tree: Any, origin: str = "config") -> Config:
    """Check a run's config that is already a tree of dicts and lists; see `load_config`."""
    return parse_tree(Config, tree, origin)


def require_kind(config: object, kind: type[BaseModel]) -> None:
    """Refuse what is no config of that kind, such as a path.

    Raises:
        ConfigError: it is not.
    """
    if not isinstance(config, kind):
        load = "load_config" if kind is Config else "load_eval_config"
        got = f"the path {str(config)!r}" if isinstance(config, str | Path) else type(config)
        raise ConfigError(f"a {kind.__name__} goes here, not {got}: make one with {load}(path)")
