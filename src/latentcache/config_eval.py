"""The config of `latentcache eval`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import (
    Field,
    field_validator,
)

from latentcache.config import Autoencoder, Network, Output
from latentcache.config_files import read_config
from latentcache.config_source import Images
from latentcache.config_types import PublicText, Section, Side, Storage, Url
from latentcache.storage_options import StorageOptions

_EXAMPLE_SHA256 = "0123456789abcdef" * 4


class Networks(Section):
    """The networks of an evaluation. Without its network, a measure is left empty."""

    inception: Network | None = Field(
        None,
        description="StyleGAN2-ADA's `inception-2015-12-05.pt`. rFID needs it.",
        examples=[{"url": "~/networks/inception-2015-12-05.pt", "sha256": _EXAMPLE_SHA256}],
    )
    lpips: Network | None = Field(
        None,
        description="StyleGAN2-ADA's `vgg16.pt`. LPIPS needs it.",
        examples=[{"url": "~/networks/vgg16.pt", "sha256": _EXAMPLE_SHA256}],
    )
    vgg16: Network | None = Field(
        None,
        description="Plain VGG16 state dict with torchvision's names. PSIM needs it.",
        examples=[{"url": "~/networks/vgg16-397923af.pth", "sha256": _EXAMPLE_SHA256}],
    )
    storage: Storage = Field(StorageOptions(), description="How to reach the networks' store.")


class EvalModel(Section):
    """A decoder to evaluate. It is one row of the table."""

    name: PublicText = Field(
        min_length=1, description="Name of the decoder in the table.", examples=["ft-MSE"]
    )
    checkpoint: Url = Field(
        description="Checkpoint whose decoder is used. It has the forms of `vae.checkpoint`.",
        examples=["hf://stabilityai/sd-vae-ft-mse"],
    )
    train_steps: int | None = Field(
        None, ge=0, description="Number of training steps, shown in the table.", examples=[840001]
    )
    link: PublicText = Field("", description="Link shown in the table.")
    comments: PublicText = Field("", description="Comments shown in the table.")
    storage: Storage = Field(StorageOptions(), description="How to reach the checkpoint's store.")


class EvalCompute(Section):
    """The resources of an evaluation. It computes in fp32."""

    num_gpus: int = Field(
        1, ge=0, description="Number of GPUs, with one actor each. 0 computes on CPUs."
    )
    num_cpu_actors: int = Field(
        1,
        ge=1,
        description="Number of actors if `num_gpus` is 0. A single actor runs in the process of "
        "the command.",
    )
    batch_size: int = Field(16, ge=1, description="Number of images per decoder batch.")


class EvalConfig(Section):
    """The config of an evaluation."""

    name: PublicText = Field(
        min_length=1, description="Name of the evaluation.", examples=["sd-vae-256"]
    )
    source: Images
    resolution_px: Side = Field(
        256, description="Side of the centre crop, in pixels. The shorter side is resized to it."
    )
    vae: Autoencoder = Field(
        description="The autoencoder that encodes the images, once for all models."
    )
    models: list[EvalModel] = Field(
        min_length=1,
        description="Decoders to evaluate.",
        examples=[[{"name": "ft-MSE", "checkpoint": "hf://stabilityai/sd-vae-ft-mse"}]],
    )
    networks: Networks = Networks()
    max_images: int | None = Field(
        None,
        ge=1,
        description="Largest number of images, spread evenly over the shards. By default all "
        "images are used.",
        examples=[5000],
    )
    picture_rows: int = Field(
        8, ge=0, le=64, description="Number of images in the side-by-side picture."
    )
    output: Output = Field(
        description="The place where the table, the figures and the picture are written."
    )
    compute: EvalCompute = EvalCompute()

    @field_validator("models")
    @classmethod
    def _names_are_distinct(cls, models: list[EvalModel]) -> list[EvalModel]:
        if len({model.name for model in models}) < len(models):
            raise ValueError("two models have the same name")
        return models


def load_eval_config(path: str | Path, overrides: Sequence[str] = ()) -> EvalConfig:
    """Read the YAML config of an evaluation.

    Args:
        path: the file.
        overrides: settings `a.b=c` that replace single values; `c` is parsed as YAML.

    Raises:
        ConfigError: the file cannot be read or a value is wrong; see `load_config`.
    """
    return read_config(EvalConfig, path, overrides)
