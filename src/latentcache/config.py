"""The config of `latentcache run`, section by section.

It holds no credentials, which come from the environment or from a profile. The string below a field
is its description, from which `scripts/config_reference.py` writes docs/config.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationInfo, field_validator

from latentcache.config_files import parse_tree, read_config
from latentcache.config_source import Source
from latentcache.config_types import (
    Count,
    OutputUrl,
    PublicText,
    Section,
    Side,
    Storage,
    Url,
    check_distinct,
)
from latentcache.errors import ConfigError
from latentcache.storage_options import StorageOptions

# The default of `transform.max_pixels`.
MAX_PIXELS = 100_000_000


class RatioBuckets(Section):
    """Aspect-ratio buckets whose area is about `resolution_px` squared."""

    max_ratio: float = Field(ge=1.0, le=16.0, examples=[2.0])
    """Largest ratio of the longer side to the shorter side."""
    step_px: Side = 64
    """Sides are multiples of this number, in pixels."""


class Transform(Section):
    """The transform from an image to the pixels that are encoded."""

    resolution_px: Side = Field(examples=[256])
    """Side of the square crop, in pixels. With buckets, the square root of their area."""
    crop: Literal["center"] = "center"
    """Part of the image that is kept."""
    resample: Literal["bicubic"] = "bicubic"
    """Filter that resizes images."""
    buckets: RatioBuckets | list[tuple[Side, Side]] | None = Field(
        None, examples=[{"max_ratio": 2.0, "step_px": 64}]
    )
    """List of [width, height] sizes in pixels, or a rule that makes them. By default there is one
    square bucket."""
    min_side_px: int | None = Field(None, ge=1, examples=[128])
    """Reject an image if its shorter side is below this, in pixels."""
    max_upscale: float | None = Field(None, gt=0, examples=[1.5])
    """Reject an image if it would be enlarged by more than this factor."""
    max_pixels: Count = MAX_PIXELS
    """Reject an image, before it is decoded, if it has more pixels than this."""
    dct_scaling: bool = False
    """Decode a JPEG at 1/2, 1/4 or 1/8 of its size if the result is still at least twice the target
    size. This is faster for large photographs; the PSNR to a full decode is about 48 dB."""

    @field_validator("buckets")
    @classmethod
    def _check_buckets(cls, buckets: Any) -> Any:
        if buckets == []:
            raise ValueError("names no size; leave it out to get one square bucket")
        return check_distinct(buckets) if isinstance(buckets, list) else buckets


class Autoencoder(Section):
    """An autoencoder. It has no default, because latents of different autoencoders do not mix."""

    checkpoint: Url = Field(examples=["hf://stabilityai/sd-vae-ft-mse"])
    """Path or URL of a diffusers folder, a single-file checkpoint or a CompVis checkpoint. `demo`
    is the small one in this package; its latents are not Stable Diffusion's."""
    storage: Storage = StorageOptions()
    """How to reach the checkpoint's store."""


class Vae(Autoencoder):
    """The autoencoder that encodes the images, and the factors that scale its latents."""

    scaling_factor: float | None = Field(None, gt=0, examples=[0.18215])
    """Scaling factor of the latents. Set it if the checkpoint does not state it, as with a lone
    CompVis file: 0.18215 for Stable Diffusion 1 and 2 and sd-vae-ft-*, 0.13025 for SDXL, 1.5305 for
    SD3, 0.3611 for FLUX.1."""
    shift_factor: float | None = Field(None, examples=[0.0609])
    """Shift of the latents, set together with `scaling_factor`: 0.0609 for SD3, 0.1159 for FLUX.1,
    0 otherwise."""


class Calibration(Section):
    """The images on which a first run measures the int8 range of each channel."""

    num_images: int = Field(512, ge=1, le=8192)
    """Largest number of images, drawn from several shards."""
    seed: int = Field(0, ge=0)
    """Random seed that chooses the images."""


class Latents(Section):
    """The form in which latents are stored."""

    posterior: Literal["mean", "moments", "sample"] = "mean"
    """What is stored of the posterior: its mean, its moments (mean and log-variance), or one
    sample."""
    dtype: Literal["float16", "bfloat16", "float32", "int8"] = "float16"
    """Data type of stored latents. int8 takes half the bytes of float16; its signal-to-noise ratio
    is 35 to 40 dB."""
    format: Literal["parquet", "safetensors"] = "parquet"
    """File format of stored latents."""
    calibration: Calibration | None = Field(None, examples=[{"num_images": 512, "seed": 0}])
    """Calibration of int8. By default a first run calibrates on 512 images."""

    @field_validator("calibration")
    @classmethod
    def _check_calibration(cls, calibration: Any, info: ValidationInfo) -> Any:
        if calibration and info.data.get("dtype", "int8") != "int8":
            raise ValueError(f"needs dtype int8, not {info.data['dtype']}")
        return calibration


class Output(Section):
    """The place where the dataset is written."""

    url: OutputUrl = Field(examples=["s3://latents/photos-256"])
    """URL or path of the dataset. It is created if it does not exist."""
    storage: Storage = StorageOptions()
    """How to reach the output's store."""


class Rejects(Section):
    """The limit for samples that are left out."""

    max_rate: float = Field(0.02, ge=0, le=1)
    """Fail if the rejects exceed this fraction of the dataset's samples. The run checks it at its
    end, and also while it runs once there are 1,000 samples."""


class Compute(Section):
    """The resources that a run uses."""

    num_gpus: int = Field(1, ge=0)
    """Largest number of GPUs, with one actor each. 0 encodes on CPUs."""
    num_cpu_actors: Count = 1
    """Number of actors if `num_gpus` is 0."""
    batch_size: Literal["auto"] | Count = "auto"
    """Images per encoder batch. `auto` tries sizes once for each GPU model."""
    decode_threads: Literal["auto"] | Count = "auto"
    """Decode threads per actor. The actor requests as many CPUs from Ray. `auto` uses the CPUs of
    the nodes that are up."""
    unit_retries: int = Field(3, ge=0)
    """Number of retries after a unit's first attempt fails."""
    preemption_retries: int = Field(20, ge=0)
    """Number of retries after a unit's node is preempted."""
    on_busy: Literal["join", "skip", "wait"] = "join"
    """What to do while another run is active on the output: `join` it, `skip` this run (exit code
    0), or `wait` until it ends."""
    wait_for_gpus_s: float = Field(0.0, ge=0)
    """Seconds to wait for the first GPU of a cluster that has none yet."""
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Precision of the encoder. `auto` chooses the fastest one whose first batch has a
    signal-to-noise ratio of at least 55 dB to fp32."""


class Network(Section):
    """A published network that a measure needs."""

    url: Url = Field(examples=["~/networks/vgg16.pt"])
    """Path or URL of the network's file."""
    sha256: str = Field(pattern="^[0-9a-f]{64}$", examples=["0123456789abcdef" * 4])
    """SHA-256 of the file, in lower-case hex. Another file is refused."""


class Qa(Section):
    """The quality check of a sample of rows during a run. Leave it out to check nothing."""

    fraction: float = Field(0.001, ge=0, le=1)
    """Fraction of all rows to check."""
    min_rows_per_bucket: int = Field(8, ge=0)
    """Smallest number of rows to check in each bucket of the dataset."""
    seed: int = Field(0, ge=0)
    """Random seed that chooses the rows."""
    decoder: Url | None = Field(None, examples=["hf://stabilityai/sd-vae-ft-ema"])
    """Checkpoint whose decoder is used. By default it is `vae.checkpoint`."""
    lpips: Network | None = Field(
        None, examples=[{"url": "~/networks/vgg16.pt", "sha256": "0123456789abcdef" * 4}]
    )
    """StyleGAN2-ADA's `vgg16.pt`. Without it LPIPS is not measured."""
    storage: Storage = StorageOptions()
    """How to reach the store of the decoder and the network."""
    min_psnr_db: float | None = 15.0
    """Fail if the mean PSNR of the QA rows is below this, in dB."""
    min_drift_db: float | None = 30.0
    """Fail if the signal-to-noise ratio of a QA row's latent to an fp32 encode is below this, in
    dB."""
    max_rejects: int | None = Field(None, ge=0, examples=[100])
    """Fail if there are more rejects than this."""


class Config(Section):
    """The config of a run."""

    name: PublicText = Field(min_length=1, examples=["photos-256"])
    """Name of the dataset."""
    source: Source
    transform: Transform
    vae: Vae
    latents: Latents = Latents()
    output: Output
    rejects: Rejects = Rejects()
    compute: Compute = Compute()
    qa: Qa | None = None


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read the YAML config of a run.

    Args:
        path, overrides: the file, and settings `a.b=c` that replace single values.

    Raises:
        ConfigError: the file cannot be read, or values are wrong: one line for each, with its path.
    """
    return read_config(Config, path, overrides)


def parse_config(tree: Any, origin: str = "config") -> Config:
    """Check the config of a run that is already a tree of dicts and lists.

    Args:
        tree, origin: the config, and its name in the `ConfigError` that names wrong values.
    """
    return parse_tree(Config, tree, origin)


def require_kind(config: object, kind: type[BaseModel]) -> None:
    """Raise `ConfigError` if an argument is, for example, a path.

    Args:
        config, kind: the argument, and `Config` or `EvalConfig`.
    """
    if not isinstance(config, kind):
        load = "load_config" if kind is Config else "load_eval_config"
        got = f"the path {str(config)!r}" if isinstance(config, str | Path) else type(config)
        raise ConfigError(f"expected a {kind.__name__}, got {got}: make one with {load}(path)")
