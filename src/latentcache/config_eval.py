"""The config of `latentcache eval`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, field_validator

from latentcache.config import Autoencoder, Network, Output
from latentcache.config_files import read_config
from latentcache.config_source import Images
from latentcache.config_types import Count, PublicText, Section, Side, Storage, Url
from latentcache.storage_options import StorageOptions

_EXAMPLE_SHA256 = "0123456789abcdef" * 4


class Networks(Section):
    """The networks of an evaluation. Without its network, a measure is left empty."""

    inception: Network | None = Field(
        None, examples=[{"url": "~/networks/inception-2015-12-05.pt", "sha256": _EXAMPLE_SHA256}]
    )
    """StyleGAN2-ADA's `inception-2015-12-05.pt`. rFID needs it."""
    lpips: Network | None = Field(
        None, examples=[{"url": "~/networks/vgg16.pt", "sha256": _EXAMPLE_SHA256}]
    )
    """StyleGAN2-ADA's `vgg16.pt`. LPIPS needs it."""
    vgg16: Network | None = Field(
        None, examples=[{"url": "~/networks/vgg16-397923af.pth", "sha256": _EXAMPLE_SHA256}]
    )
    """Plain VGG16 state dict with torchvision's names. PSIM needs it."""
    storage: Storage = StorageOptions()
    """How to reach the networks' store."""


class EvalModel(Section):
    """A decoder to evaluate. It is one row of the table."""

    name: PublicText = Field(min_length=1, examples=["ft-MSE"])
    """Name of the decoder in the table."""
    checkpoint: Url = Field(examples=["hf://stabilityai/sd-vae-ft-mse"])
    """Checkpoint whose decoder is used. It has the forms of `vae.checkpoint`."""
    train_steps: int | None = Field(None, ge=0, examples=[840001])
    """Number of training steps, shown in the table."""
    link: PublicText = ""
    """Link shown in the table."""
    comments: PublicText = ""
    """Comments shown in the table."""
    storage: Storage = StorageOptions()
    """How to reach the checkpoint's store."""


class EvalCompute(Section):
    """The resources of an evaluation. It computes in fp32."""

    num_gpus: int = Field(1, ge=0)
    """Number of GPUs, with one actor each. 0 computes on CPUs."""
    num_cpu_actors: Count = 1
    """Number of actors if `num_gpus` is 0. A single actor runs in the process of the command."""
    batch_size: Count = 16
    """Number of images per decoder batch."""


class EvalConfig(Section):
    """The config of an evaluation."""

    name: PublicText = Field(min_length=1, examples=["sd-vae-256"])
    """Name of the evaluation."""
    source: Images
    resolution_px: Side = 256
    """Side of the centre crop, in pixels. The shorter side is resized to it."""
    vae: Autoencoder
    """The autoencoder that encodes the images, once for all models."""
    models: list[EvalModel] = Field(
        min_length=1,
        examples=[[{"name": "ft-MSE", "checkpoint": "hf://stabilityai/sd-vae-ft-mse"}]],
    )
    """Decoders to evaluate."""
    networks: Networks = Networks()
    max_images: int | None = Field(None, ge=1, examples=[5000])
    """Largest number of images, spread evenly over the shards. By default all images are used."""
    picture_rows: int = Field(8, ge=0, le=64)
    """Number of images in the side-by-side picture."""
    output: Output
    """The place where the table, the figures and the picture are written."""
    compute: EvalCompute = EvalCompute()

    @field_validator("models")
    @classmethod
    def _check_names(cls, models: list[EvalModel]) -> list[EvalModel]:
        if len({model.name for model in models}) < len(models):
            raise ValueError("two models have the same name")
        return models


def load_eval_config(path: str | Path, overrides: Sequence[str] = ()) -> EvalConfig:
    """Read the YAML config of an evaluation.

    Args:
        path, overrides: as for `load_config`, which has the same errors.
    """
    return read_config(EvalConfig, path, overrides)
