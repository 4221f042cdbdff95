"""Small networks that are called like the published ones, whose weights are not here."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# VGG16 as torchvision numbers it: channels of each convolution, and where it pools.
_VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")


class _Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(3 * 8 * 8, 2048)

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        x = F.adaptive_avg_pool2d(img.float() / 255, (8, 8)).flatten(1)
        features = self.project(x).relu()
        return features if return_features else features.softmax(dim=1)


class _Lpips(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(
        self,
        img: Tensor,
        resize_images: bool = True,
        return_features: bool = False,
        return_lpips: bool = False,
    ) -> Tensor:
        if resize_images or return_features or not return_lpips:
            raise ValueError("not the way in which LPIPS is asked for")
        height, width = img.shape[2], img.shape[3]
        return self.conv(img / 255).flatten(1) / (height * width) ** 0.5


def write_inception(path: Path) -> Path:
    """A stand-in for `inception-2015-12-05.pt`."""
    return _script(path, _Inception())


def write_lpips(path: Path) -> Path:
    """A stand-in for StyleGAN2-ADA's `vgg16.pt`."""
    return _script(path, _Lpips())


def write_vgg16(path: Path) -> Path:
    """A VGG16 of random weights, saved as torchvision's are; its classifier is a stub."""
    torch.manual_seed(0)
    state = {f"features.{name}": tensor for name, tensor in vgg16_features().state_dict().items()}
    torch.save(state | {"classifier.0.weight": torch.zeros(1)}, path)
    return path


def vgg16_features() -> nn.Sequential:
    """The convolutional part; random, but such that activations neither die out nor grow."""
    layers: list[nn.Module] = []
    in_channels = 3
    for step in _VGG16:
        if isinstance(step, str):
            layers.append(nn.MaxPool2d(2))
            continue
        conv = nn.Conv2d(in_channels, step, 3, padding=1)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        nn.init.normal_(conv.bias, std=0.1)
        layers += [conv, nn.ReLU()]
        in_channels = step
    return nn.Sequential(*layers)


def named(path: Path) -> dict[str, str]:
    """A network as a config names it."""
    return {"url": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def load_script(path: Path) -> torch.jit.ScriptModule:
    """Load a stand-in as its users would, without the package."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        script: torch.jit.ScriptModule = torch.jit.load(str(path))
    return script


def _script(path: Path, network: nn.Module) -> Path:
    torch.manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(network.eval()), path)
    return path
