"""Networks: the right file is loaded and called rightly, and a wrong one is never run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from latentcache.errors import ConfigError, StorageError
from latentcache.networks import load_inception, load_lpips, load_vgg16
from latentcache.storage_options import StorageOptions
from makers import draw
from measures import Pixels, as_tensor, psim_by_modules
from servers import S3Server
from stand_ins import load_script, named, write_inception, write_lpips, write_vgg16

WRITERS: dict[str, Callable[[Path], Path]] = {
    "inception": write_inception,
    "lpips": write_lpips,
    "vgg16": write_vgg16,
}
LOADERS = {"inception": load_inception, "lpips": load_lpips, "vgg16": load_vgg16}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("networks")
    return {name: write(folder / f"{name}.pt") for name, write in WRITERS.items()}


def images_of(num: int, seed: int, width: int = 48, height: int = 32) -> Pixels:
    return np.stack([np.asarray(draw(width, height, seed + index)) for index in range(num)])


IMAGES, OTHERS = images_of(3, 0), images_of(3, 10)
A, B = as_tensor(IMAGES), as_tensor(OTHERS)


def test_inception_gives_features_before_the_softmax(files: dict[str, Path]):
    features = load_inception(**named(files["inception"]))(A)
    assert features.shape == (3, 2048)
    with torch.inference_mode():
        expected = load_script(files["inception"])(A, return_features=True)
    torch.testing.assert_close(features, expected)


def test_lpips_is_the_squared_distance_of_its_features(files: dict[str, Path]):
    distance = load_lpips(**named(files["lpips"]))
    script = load_script(files["lpips"])
    with torch.inference_mode():
        a, b = (script(x.float(), resize_images=False, return_lpips=True) for x in (A, B))
    expected = ((a - b) ** 2).sum(dim=1).double()
    actual = distance(A, B)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)
    assert distance(A, A).tolist() == [0.0] * 3


def test_psim_is_the_unweighted_distance_of_vgg16(files: dict[str, Path]):
    distance = load_vgg16(**named(files["vgg16"]))
    actual = distance(A, B)
    assert actual.dtype == torch.float64
    expected = psim_by_modules(files["vgg16"], IMAGES, OTHERS)
    assert actual.tolist() == pytest.approx(expected, rel=1e-5)
    assert distance(A, A).tolist() == [0.0] * 3


def test_a_batch_of_any_size_is_measured_image_by_image(files: dict[str, Path]):
    distance = load_lpips(**named(files["lpips"]))
    # More pixels than are taken at once.
    a, b = (as_tensor(images_of(3, seed, 512, 256)) for seed in (0, 10))
    one_by_one = [distance(x[None], y[None]).item() for x, y in zip(a, b, strict=True)]
    assert distance(a, b).tolist() == pytest.approx(one_by_one, rel=1e-4)


@pytest.mark.parametrize("name", LOADERS)
def test_a_wrong_hash_is_an_error_before_anything_is_loaded(
    files: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
):
    def never(*_: object, **__: object) -> None:
        raise AssertionError("it was loaded")

    monkeypatch.setattr(torch, "load", never)
    monkeypatch.setattr(torch.jit, "load", never)
    network, wrong = named(files[name]), "0" * 64
    with pytest.raises(ConfigError, match="download it again") as caught:
        LOADERS[name](network["url"], wrong)
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in (network["url"], network["sha256"], wrong))


@pytest.mark.parametrize("name", LOADERS)
def test_a_missing_network_file_is_an_error(name: str, tmp_path: Path):
    for path in (tmp_path / "nowhere.pt", tmp_path):
        with pytest.raises(ConfigError, match="no network"):
            LOADERS[name](str(path), "0" * 64)


WRONG = [
    ("inception", "vgg16", "is not a TorchScript file"),
    ("inception", "lpips", "cannot be called with return_features=True"),
    ("lpips", "inception", "cannot be called with resize_images=False, return_lpips=True"),
    ("lpips", "vgg16", "is not a TorchScript file"),
    ("vgg16", "lpips", "is not a PyTorch state dict"),
]


@pytest.mark.parametrize(("name", "given", "message"), WRONG)
def test_a_different_network_is_an_error(
    files: dict[str, Path], name: str, given: str, message: str
):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        LOADERS[name](**named(files[given]))
    assert "\n" not in str(caught.value)
    assert files[given].name in str(caught.value)


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("data", [b"", b"no network at all", b"PK\x03\x04 cut off"])
def test_a_file_that_is_no_network_is_an_error(name: str, data: bytes, tmp_path: Path):
    path = tmp_path / "file.pt"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"file\.pt is not a"):
        LOADERS[name](**named(path))


@pytest.mark.parametrize(
    "state",
    [{}, {"features.0.weight": torch.zeros(64, 3, 3, 3)}, {"features.0.weight": 3}, [1, 2]],
)
def test_a_state_dict_of_another_model_is_an_error(state: object, tmp_path: Path):
    path = tmp_path / "other.pth"
    torch.save(state, path)
    with pytest.raises(ConfigError, match=r"other\.pth is not a (plain VGG16|PyTorch state dict)"):
        load_vgg16(**named(path))


def test_networks_load_from_a_store(files: dict[str, Path], moto: S3Server):
    bucket = moto.make_bucket("networks", {"deep/lpips.pt": files["lpips"].read_bytes()})
    network = named(files["lpips"]) | {"url": f"{bucket}/deep/lpips.pt"}
    distance = load_lpips(**network, options=moto.options)
    assert distance(A, B).tolist() == load_lpips(**named(files["lpips"]))(A, B).tolist()
    with pytest.raises(ConfigError, match=r"deep/none\.pt: no such file"):
        load_lpips(f"{bucket}/deep/none.pt", "0" * 64, moto.options)
    with pytest.raises(StorageError):
        load_lpips(network["url"], network["sha256"], StorageOptions(profile="absent"))
