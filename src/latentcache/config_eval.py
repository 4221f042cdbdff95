"""The config of `latentcache eval`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import (
    Field,
    field_validator,
)

from latentcache.config import Autoencoder, Images, Network, Output
from latentcache.config_files import read_config
from latentcache.config_types import PublicText, Section, Side, Storage, Url
from latentcache.storage_options import StorageOptions


class Networks(Section):
    """The networks of an evaluation; a measure whose network is left out stays empty."""

    inception: Network | None = Field(
        None, description="StyleGAN2-ADA's `inception-2015-12-05.pt`, for rFID."
    )
    lpips: Network | None = Field(None, description="StyleGAN2-ADA's `vgg16.pt`, for LPIPS.")
    vgg16: Network | None = Field(
        None, description="A plain VGG16 state dict with torchvision's names, for PSIM."
    )
    storage: Storage = StorageOptions()


class EvalModel(Section):
    """A decoder to evaluate: one row of the table."""

    name: PublicText = Field(min_length=1)
    checkpoint: Url = Field(description="As in `vae.checkpoint`; its decoder is used.")
    train_steps: int | None = Field(None, ge=0, description="For the table only.")
    link: PublicText = Field("", description="For the table only.")
    comments: PublicText = Field("", description="For the table only.")
    storage: Storage = StorageOptions()


class EvalCompute(Section):
    """What an evaluation may use; it computes in fp32."""

    num_gpus: int = Field(1, ge=0, description="One actor each; 0 computes on CPUs.")
    num_cpu_actors: int = Field(
        1, ge=1, description="Actors where `num_gpus` is 0; one works in the command's own process."
    )
    batch_size: int = Field(16, ge=1, description="Images decoded at once.")


class EvalConfig(Section):
    """A whole config file of `latentcache eval`."""

    name: PublicText = Field(min_length=1)
    source: Images
    resolution_px: Side = Field(256, description="The shorter side's; then the centre is cropped.")
    vae: Autoencoder = Field(description="Encodes the images, once for all models.")
    models: list[EvalModel] = Field(min_length=1)
    networks: Networks = Networks()
    max_images: int | None = Field(
        None, ge=1, description="At most, spread evenly over the shards; all if left out."
    )
    picture_rows: int = Field(8, ge=0, le=64, description="Images in the side-by-side picture.")
    output: Output = Field(description="Where the table, the figures and the picture are written.")
    compute: EvalCompute = EvalCompute()

    @field_validator("models")
    @classmethod
    def _names_are_distinct(cls, models: list[EvalModel]) -> list[EvalModel]:
        if len({model.name for model in models}) < len(models):
            raise ValueError("two models have one name")
        return models


def load_eval_config(path: str | Path, overrides: Sequence[str] = ()) -> EvalConfig:
    """Read the YAML config of an evaluation; see `load_config`."""
    return read_config(EvalConfig, path, overrides)
