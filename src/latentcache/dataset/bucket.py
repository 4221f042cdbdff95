"""A bucket: one image size that samples are resized and cropped to, and its name on disk."""

from __future__ import annotations

from typing import NamedTuple


class Bucket(NamedTuple):
    """One image size in pixels; all latents of a bucket have one shape."""

    width_px: int
    height_px: int

    @property
    def name(self) -> str:
        """The name of the bucket, `WIDTHxHEIGHT`, as in file names."""
        return f"{self.width_px}x{self.height_px}"

    @property
    def num_pixels(self) -> int:
        """The number of pixels of an image of this size."""
        return self.width_px * self.height_px

    @classmethod
    def parse(cls, name: str) -> Bucket:
        """Return the bucket of a name that has already been checked."""
        return cls(*map(int, name.split("x")))
