"""A `.npy` file per latent, listed and loaded one by one, as in fast-DiT's train.py."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from rivals.program import Dataset, main


class Files(TorchDataset[Tensor]):
    """The latents of a folder, sorted by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = sorted(name for name in os.listdir(folder) if name.endswith(".npy"))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(np.load(os.path.join(self.folder, self.names[index])))


def write(latents: npt.NDArray[np.float16], folder: Path, row_bytes: int, tuned: bool) -> None:
    for number, latent in enumerate(latents):
        np.save(folder / f"{number:09d}.npy", latent)


def read(data: Dataset) -> Callable[[], Iterable[Tensor]]:
    files = Files(data.folder)
    loader = DataLoader(files, data.batch_size, shuffle=True, num_workers=0, drop_last=True)
    return lambda: loader


if __name__ == "__main__":
    main("torch", write, read, no_remote="np.load reads no S3, and a request per row is no format")
