"""The section `source` of a config."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from latentcache.config_types import Section, Storage, Url, check_distinct
from latentcache.storage_options import StorageOptions

# Columns that every row has. A kept field must have another name.
_ROW_COLUMNS = {
    *("key", "latent", "latent_shape", "latent_dtype"),
    *("original_width", "original_height", "crop_top", "crop_left"),
}


class Images(Section):
    """The images that are read: set `shards` or `folder`."""

    shards: Url | list[Url] | None = Field(
        None, examples=["s3://images/photos/{000000..000099}.tar"]
    )
    """URL of WebDataset tars or Parquet files, with brace ranges or a glob, or a list of such
    URLs."""
    folder: Url | None = Field(None, examples=["~/photos"])
    """URL of a folder of image files. It replaces `shards`."""
    image: list[str] = Field(
        [
            *("jpg", "jpeg", "png", "webp", "avif", "gif"),
            *("bmp", "tif", "tiff", "jxl", "heic", "heif", "image"),
        ],
        min_length=1,
    )
    """Fields that hold the image: file name extensions (in any case) or Parquet columns, in order
    of preference."""
    key: str | None = Field(None, examples=["id"])
    """Parquet column that holds the key of a sample. By default the key is the path of the
    image."""
    caption_index: int = Field(0, ge=0)
    """Index of the element to keep if a Parquet text column holds lists."""
    max_sample_bytes: int = Field(256 * 2**20, ge=1, le=2**31 - 1)
    """Reject a sample, before it is read, if its fields together are larger than this, in bytes."""
    storage: Storage = StorageOptions()
    """How to reach the source's store."""

    @field_validator("image")
    @classmethod
    def _check_endings(cls, image: list[str]) -> list[str]:
        endings = [name.removeprefix(".") for name in image]
        for name in endings:
            if not name or "*" in name or "/" in name:
                raise ValueError(
                    f"{name!r} is not a file name extension: write it without '*' and '/', such as "
                    "'jpg'"
                )
        return check_distinct(endings)

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if (self.shards is None) == (self.folder is None):
            raise ValueError("name either `shards` or `folder`")
        if self.key is not None and self.shards is None:
            raise ValueError("`key` names a column of Parquet files, so it needs `shards`")
        return self


class Source(Images):
    """The images that are read, and the fields of their samples that become columns."""

    keep: list[str] = Field([], examples=[["txt", "json"]])
    """Fields that become columns of the dataset. Columns hold text, except `cls`, which holds
    integers. `txt` becomes the column `caption`."""
    num_units: int | None = Field(None, ge=1, le=65536, examples=[64])
    """Number of units that a folder is split into, 64 by default. It cannot change after the first
    run."""
    moved_from: Url | None = Field(None, examples=["s3://old-bucket/photos"])
    """URL of the folder that held the source before it moved. The dataset keeps its rows under the
    old URLs, and the run encodes only new samples."""
    on_missing: Literal["keep", "drop"] = "keep"
    """Whether rows stay in the dataset if their shard is no longer listed."""

    @field_validator("keep")
    @classmethod
    def _check_keep(cls, keep: list[str]) -> list[str]:
        for name in keep:
            if name in _ROW_COLUMNS:
                raise ValueError(f"{name!r} is already a column of every row")
        if {"txt", "caption"} <= set(keep):
            raise ValueError("`txt` and `caption` would both become the column `caption`")
        return check_distinct(keep)

    @model_validator(mode="after")
    def _check_num_units(self) -> Self:
        if self.num_units is not None and self.folder is None:
            raise ValueError("`num_units` needs `folder`: each shard is already a unit")
        return self
