"""`latentcache inspect --image`: decoded rows in one picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from checkpoints import write_diffusers_folder
from latentcache import Dataset, KLAutoencoder, load_vae, open_dataset, to_uint8
from latentcache.dataset.contract import Contract
from latentcache.errors import ConfigError, DatasetError, StorageError
from latentcache.qa.sheet import draw_sheet, load_decoder, save_sheet
from latentcache.vae.weights import encoder_fingerprint
from makers import make_contract, make_latents, write_dataset
from runs import Cli

SQUARE, WIDE = (64, 64), (96, 48)
DEMO_CHANNELS = 16


@pytest.fixture(scope="module")
def vae() -> KLAutoencoder:
    return load_vae("demo")


def make(folder: Path, num_rows: int, contract: Contract | None = None) -> Dataset:
    """A dataset that says the demo VAE encoded it, with as many rows in each of two buckets."""
    contract = contract or make_contract(buckets=(SQUARE, WIDE), latent_channels=DEMO_CHANNELS)
    latents = {b: make_latents(contract, b, num_rows) for b in contract.transform.buckets}
    write_dataset(folder, contract, {"a.tar": latents}, provenance={"checkpoint": "demo"})
    return open_dataset(str(folder / "out"))


def demo_contract(vae: KLAutoencoder) -> Contract:
    contract = make_contract(buckets=(SQUARE, WIDE), latent_channels=DEMO_CHANNELS)
    fingerprint = encoder_fingerprint(vae)
    return replace(contract, vae=replace(contract.vae, encoder_fingerprint=fingerprint))


def pixels_of(path: Path) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


@pytest.mark.parametrize("posterior", ["mean", "moments"])
def test_sheet_shows_the_decoded_latent(tmp_path: Path, vae: KLAutoencoder, posterior: str):
    contract = make_contract(buckets=(SQUARE,), posterior=posterior, latent_channels=DEMO_CHANNELS)
    dataset = make(tmp_path, 1, contract)
    assert save_sheet(dataset, vae, tmp_path / "sheet.png") == 1
    sheet = pixels_of(tmp_path / "sheet.png")
    (decoded,) = to_uint8(vae.decode(dataset[0].latent[None, :DEMO_CHANNELS].float()))
    picture = Image.fromarray(decoded.permute(1, 2, 0).numpy())
    expected = np.asarray(picture.resize((200, 200), Image.Resampling.LANCZOS)).astype(int)
    top, left = (int(where.min()) for where in np.nonzero((sheet < 250).any(axis=2)))
    assert abs(sheet[top : top + 200, left : left + 200] - expected).max() <= 1


def test_rows_are_drawn_with_the_seed(tmp_path: Path, vae: KLAutoencoder):
    dataset = make(tmp_path, 6)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert save_sheet(dataset, vae, tmp_path / f"{name}.png", 5, seed=seed) == 5
    first, again, other = (pixels_of(tmp_path / f"{name}.png") for name in "abc")
    assert (first == again).all()
    assert first.shape != other.shape or (first != other).any()
    steps: list[tuple[int, int]] = []
    progress = lambda done, total: steps.append((done, total))  # noqa: E731
    assert save_sheet(dataset, vae, tmp_path / "all.jpg", 99, progress=progress) == 12
    assert steps == [(done, 12) for done in range(1, 13)]


def test_lines_have_one_width_and_pictures_keep_their_shape():
    colours = ("red", "blue", "green")
    sizes = [(512, 512), (704, 384), (384, 704)] * 12
    tiles = [(Image.new("RGB", s, colours[i % 3]), f"{i}") for i, s in enumerate(sizes)]
    sheet = np.asarray(draw_sheet(tiles)).astype(int)
    assert 1400 < sheet.shape[1] <= 1460
    areas: dict[tuple[int, int], int] = {}
    for size, colour in zip(sizes[:3], ((255, 0, 0), (0, 0, 255), (0, 128, 0)), strict=True):
        areas[size] = int((sheet == colour).all(axis=2).sum())
    # At one height an area goes as its ratio.
    assert areas[704, 384] / areas[512, 512] == pytest.approx(704 / 384, rel=0.06)
    assert areas[384, 704] / areas[512, 512] == pytest.approx(384 / 704, rel=0.06)
    (inked,) = np.nonzero((sheet < 250).any(axis=(0, 2)))
    assert inked.max() > sheet.shape[1] - 20


@pytest.mark.parametrize("key", ["k" * 500, "two\nlines", "\x00\u202e", "鍵", ""])
def test_labels_accept_any_key(key: str):
    image = Image.new("RGB", (64, 64))
    assert draw_sheet([(image, key)]).size == draw_sheet([(image, "k")]).size


def test_demo_decoder_of_the_dataset_is_loaded(tmp_path: Path, vae: KLAutoencoder):
    actual, notes = load_decoder(make(tmp_path, 1, demo_contract(vae)))
    assert notes == []
    latents = torch.randn(1, DEMO_CHANNELS, 4, 4)
    assert torch.equal(actual.cpu().decode(latents), vae.decode(latents))


def test_decoder_with_another_encoder_has_a_note(tmp_path: Path):
    _, notes = load_decoder(make(tmp_path, 1))
    assert notes == ["demo has another encoder than the one that made these latents"]


def test_unusable_decoder_is_refused(tmp_path: Path):
    dataset = make(tmp_path, 1)
    with pytest.raises(ConfigError, match=r"no decoder at .*/none:"):
        load_decoder(dataset, str(tmp_path / "none"))
    write_diffusers_folder(tmp_path / "narrow")
    with pytest.raises(ConfigError, match="latent_channels is 4, that of the latents is 16"):
        load_decoder(dataset, str(tmp_path / "narrow"))
    contract = make_contract()
    latents = {SQUARE: make_latents(contract, SQUARE, 1)}
    for name, provenance in (("unnamed", {}), ("gone", {"checkpoint": str(tmp_path / "none")})):
        write_dataset(tmp_path / name, contract, {"a.tar": latents}, provenance=provenance)
        with pytest.raises(ConfigError, match="--decoder"):
            load_decoder(open_dataset(str(tmp_path / name / "out")))


def test_unwritable_target_fails_before_decoding(tmp_path: Path, vae: KLAutoencoder):
    dataset = make(tmp_path, 1)
    with pytest.raises(ConfigError, match=r"sheet\.txt: name it \.png"):
        save_sheet(dataset, vae, tmp_path / "sheet.txt")
    with pytest.raises(StorageError, match=r"nowhere/sheet\.png"):
        save_sheet(dataset, vae, tmp_path / "nowhere" / "sheet.png")
    write_dataset(tmp_path / "empty", make_contract(), {"a.tar": {}})
    with pytest.raises(DatasetError, match="no rows to show"):
        save_sheet(open_dataset(str(tmp_path / "empty" / "out")), vae, tmp_path / "sheet.png")
    assert not list(tmp_path.glob("sheet*"))


def test_inspect_command_writes_a_sheet(cli: Cli, tmp_path: Path, vae: KLAutoencoder):
    make(tmp_path, 2, demo_contract(vae))
    url, target = tmp_path / "out", tmp_path / "sheet.png"
    actual = cli.ok("inspect", url, "--image", target, "--rows", "3")
    assert actual == {"image": str(target), "num_rows": 3, "notes": []}
    with Image.open(target) as picture:
        assert picture.format == "PNG"
    result = cli("inspect", url, "--image", target, "--decoder", "demo")
    assert (result.code, result.stderr) == (0, "")
    assert result.stdout == f"4 rows in {target}\n"
    for args, message in (
        (["--decoder", "demo"], "--decoder needs --image"),
        (["--image", target, "--rows", "0"], "--image needs at least one row"),
        (["--image", target, "--decoder", tmp_path / "none"], "none"),
    ):
        result = cli("inspect", url, *args)
        assert result.code == 2
        assert len(result.stderr.splitlines()) == 1
        assert message in result.stderr
