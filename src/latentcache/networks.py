"""Load the published networks that some metrics need, after a check of their SHA-256.

Two of them are TorchScript, and loading TorchScript runs a program. So every file is configured
together with its SHA-256, which is compared with exactly the bytes that are loaded.
"""

from __future__ import annotations

import hashlib
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from io import BytesIO

import torch
import torch.nn.functional as F
from torch import Tensor

from latentcache.errors import ConfigError, ObjectNotFound, first_line
from latentcache.storage import Store, split_url
from latentcache.storage_options import StorageOptions

Features = Callable[[Tensor], Tensor]
"""A function from uint8 [B, 3, H, W] on any device to float32 [B, D] on the network's device."""

Distance = Callable[[Tensor, Tensor], Tensor]
"""A function from two batches of images like `Features` gets to float64 [B] on its device."""

Device = str | torch.device

NUM_INCEPTION_FEATURES = 2048

_PROBE = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)

# The first layers of VGG16 alone take 70 MB for an image of 256 px.
_PIXELS_AT_ONCE = 4 * 256 * 256

# Simonyan and Zisserman 2015, configuration D. Each block between two poolings has the indices of
# its convolutions in torchvision's `features`, and their number of channels.
_VGG16_BLOCKS = (
    *(((0, 2), 64), ((5, 7), 128), ((10, 12, 14), 256)),
    *(((17, 19, 21), 512), ((24, 26, 28), 512)),
)
# The mean and standard deviation of ImageNet (RGB) with which torchvision's weights were trained.
_IMAGENET_MEAN_STD = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def load_inception(
    url: str, sha256: str, options: StorageOptions = StorageOptions(), device: Device = "cpu"
) -> Features:
    """Load StyleGAN2-ADA's TorchScript file with the weights of the original FID.

    Args:
        url, options: path or URL of `inception-2015-12-05.pt`, and how to reach its store.
        sha256, device: SHA-256 of the file, lower-case hex; and the device of the network.

    Raises:
        ConfigError: there is no such file, its hash differs, or it is not such a network.
        StorageError: the store cannot be reached.
    """
    network, shape = _load_script(url, sha256, options, device, _PROBE, return_features=True)
    if shape[1:] != (NUM_INCEPTION_FEATURES,):
        raise ConfigError(
            f"{url} returns features of shape {list(shape[1:])}, not "
            f"[{NUM_INCEPTION_FEATURES}]: use StyleGAN2-ADA's inception-2015-12-05.pt"
        )
    return network


def load_lpips(
    url: str, sha256: str, options: StorageOptions = StorageOptions(), device: Device = "cpu"
) -> Distance:
    """Load LPIPS (Zhang et al. 2018, on VGG16) as StyleGAN2-ADA published it: `vgg16.pt`.

    Its features have the distance as the sum of squared differences. Args: see `load_inception`.
    """
    arguments = {"resize_images": False, "return_lpips": True}
    network, shape = _load_script(url, sha256, options, device, _PROBE.float(), **arguments)
    if len(shape) != 2:
        raise ConfigError(f"{url} returns no LPIPS features: use StyleGAN2-ADA's vgg16.pt")

    def distance(images: Tensor, reference: Tensor) -> Tensor:
        squared = (network(images) - network(reference)).square()
        return squared.sum(dim=1, dtype=torch.float64)

    return _few_at_once(distance)


def load_vgg16(
    url: str, sha256: str, options: StorageOptions = StorageOptions(), device: Device = "cpu"
) -> Distance:
    """Load a plain VGG16 and return PSIM, an unweighted perceptual distance.

    PSIM is LPIPS without its learned weights (the baseline of Zhang et al. 2018, equation 1 with w
    = 1). The activations after relu1_2, 2_2, 3_3, 4_3 and 5_3 are divided by their length over the
    channels. Their squared difference is summed over the channels, averaged over space, and summed
    over the layers. The file is a state dict with torchvision's names (`features.0.weight`, …); its
    classifier is not used. Args: see `load_inception`, also for the errors.
    """
    weights = {name: tensor.to(device) for name, tensor in _load_vgg16(url, sha256, options)}

    def distance(images: Tensor, reference: Tensor) -> Tensor:
        layers = (_vgg16_layers(weights, x.to(device)) for x in (images, reference))
        squared = [(a - b).square().sum(dim=1).double() for a, b in zip(*layers, strict=True)]
        return torch.stack([maps.mean(dim=(1, 2)) for maps in squared]).sum(dim=0)

    return _few_at_once(distance)


def _few_at_once(distance: Distance) -> Distance:
    """Return a distance that splits batches, so that its memory does not depend on their size."""

    @torch.inference_mode()
    def bounded(images: Tensor, reference: Tensor) -> Tensor:
        few = max(1, _PIXELS_AT_ONCE // (images.shape[2] * images.shape[3]))
        pairs = zip(torch.split(images, few), torch.split(reference, few), strict=True)
        return torch.cat([distance(a, b) for a, b in pairs])

    return bounded


def _read(url: str, sha256: str, options: StorageOptions) -> BytesIO:
    """Return the content of a file; raise `ConfigError` unless it has this hash."""
    folder, name = split_url(url)
    try:
        data = Store(folder, options).read_bytes(name)
    except ObjectNotFound as error:
        raise ConfigError(f"no network: {error}; give its path or URL") from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != sha256:
        raise ConfigError(
            f"{url} is not the expected file: its SHA-256 is {digest}, but the config has "
            f"{sha256}: download it again, or set the hash of a file that you trust"
        )
    return BytesIO(data)


def _load_script(
    url: str, sha256: str, options: StorageOptions, device: Device, probe: Tensor, **arguments: bool
) -> tuple[Features, torch.Size]:
    """Return a function that calls a TorchScript network, and the shape of its output for `probe`.

    The function converts images to the dtype of `probe`.
    """
    file = _read(url, sha256, options)
    with warnings.catch_warnings():
        # torch deprecates TorchScript, but these networks were published in no other format.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            load: Callable[..., torch.jit.ScriptModule] = torch.jit.load
            network = load(file, map_location="cpu").eval()
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"{url} is not a TorchScript file: {first_line(error)}") from error
    try:
        with torch.inference_mode():
            output = network(probe, **arguments)
    except (RuntimeError, torch.jit.Error) as error:
        called = ", ".join(f"{name}={value}" for name, value in arguments.items())
        raise ConfigError(
            f"{url} cannot be called with {called}, as StyleGAN2-ADA's networks are: "
            f"{first_line(error)}"
        ) from error
    if not isinstance(output, Tensor):
        raise ConfigError(f"{url} does not return a tensor: use one of StyleGAN2-ADA's networks")
    network = network.to(device)

    @torch.inference_mode()
    def call(images: Tensor) -> Tensor:
        features: Tensor = network(images.to(device).to(probe.dtype), **arguments)
        return features

    return call, output.shape


def _load_vgg16(url: str, sha256: str, options: StorageOptions) -> Iterator[tuple[str, Tensor]]:
    """Yield the convolutions of a VGG16 state dict by name, as float32, with checked shapes."""
    file = _read(url, sha256, options)
    try:
        with warnings.catch_warnings():
            # torch warns of a TorchScript file, which is an error below.
            warnings.simplefilter("ignore", UserWarning)
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, LookupError, pickle.UnpicklingError) as error:
        raise ConfigError(f"{url} is not a PyTorch state dict: {first_line(error)}") from error
    if not isinstance(tensors, dict):
        raise ConfigError(f"{url} is not a PyTorch state dict")
    in_channels = 3
    for numbers, channels in _VGG16_BLOCKS:
        for number in numbers:
            for part, shape in (("weight", (channels, in_channels, 3, 3)), ("bias", (channels,))):
                name = f"features.{number}.{part}"
                tensor = tensors.get(name)
                if not isinstance(tensor, Tensor) or tensor.shape != shape:
                    raise ConfigError(
                        f"{url} is not a plain VGG16 with torchvision's names: it has no {name} "
                        f"of shape {list(shape)}"
                    )
                yield name, tensor.float()
            in_channels = channels


def _vgg16_layers(weights: Mapping[str, Tensor], images: Tensor) -> Iterator[Tensor]:
    """Yield the last activations of each block, [B, C, h, w], of length 1 over the channels."""
    mean, std = torch.tensor(_IMAGENET_MEAN_STD, device=images.device)[..., None, None]
    x = (images.float() / 255 - mean) / std
    for index, (numbers, _) in enumerate(_VGG16_BLOCKS):
        if index:
            x = F.max_pool2d(x, 2)
        for number in numbers:
            weight, bias = (weights[f"features.{number}.{part}"] for part in ("weight", "bias"))
            x = F.conv2d(x, weight, bias, padding=1).relu()
        # Where all channels are zero, the small number avoids a division by zero.
        yield x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)
