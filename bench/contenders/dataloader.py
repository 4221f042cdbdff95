"""The usual script: a torch `DataLoader` with PIL transforms, diffusers, and one file per image.

Its settings are `num_workers` and `batch_size`.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

from contenders import RESOLUTION_PX, Asked, load_peer, tell

Item = tuple[str, torch.Tensor]


def transform(data: bytes) -> torch.Tensor:
    """Resize the shorter side, crop the centre, scale to [-1, 1]: float32 [3, H, W]."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = RESOLUTION_PX / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (image.width - RESOLUTION_PX) // 2, (image.height - RESOLUTION_PX) // 2
    image = image.crop((left, top, left + RESOLUTION_PX, top + RESOLUTION_PX))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


class Photos(IterableDataset[Item]):
    """The photographs of the shards, divided among the workers."""

    def __init__(self, shards: list[str]) -> None:
        self._shards = shards

    def __iter__(self) -> Iterator[Item]:
        for sample in webdataset.WebDataset(self._shards, shardshuffle=False):
            yield sample["__key__"], transform(sample["jpg"])


def encode_all(loader: DataLoader[Item], encode: Callable[[torch.Tensor], torch.Tensor]) -> int:
    """Encode batch by batch and save each latent; return the number of images."""
    num_images = 0
    for keys, images in loader:
        latents = encode(images).half()
        for key, latent in zip(keys, latents, strict=True):
            np.save(asked.out / f"{key}.npy", latent.numpy())
        num_images += len(keys)
    return num_images


if __name__ == "__main__":
    asked = Asked.of_command_line()
    encode = load_peer(asked.encoder)
    asked.out.mkdir()
    shards = [str(path) for path in sorted(Path(asked.shards).glob("*.tar"))]
    loader = DataLoader(
        Photos(shards),
        batch_size=asked.settings["batch_size"],
        num_workers=asked.settings["num_workers"],
    )
    began = time.time()
    num_images = encode_all(loader, encode)
    tell(num_images, began, time.time())
