"""The model card's table: figures against plain loops, refusals, and any way to share the work."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from skimage.metrics import peak_signal_noise_ratio
from torch import Tensor

import latentcache
from checkpoints import TINY_KL_F8, write_diffusers_folder, write_folder
from corpus import Shard
from latentcache import load_vae, to_uint8
from latentcache.config_eval import EvalConfig, load_eval_config
from latentcache.errors import CheckpointError, ConfigError, SourceError, StorageError
from latentcache.evaluation.card import Evaluation, Picture, draw_side_by_side
from latentcache.evaluation.evaluate import evaluate, plan_evaluation
from makers import draw, encode_image, png, write_tar
from measures import (
    Pixels,
    as_tensor,
    frechet_by_singular_values,
    psim_by_modules,
    ssim_by_skimage,
)
from runs import Cli, Result
from servers import FaultyProxy, S3Server, cut_halfway
from stand_ins import load_script, named, write_inception, write_lpips, write_vgg16

pytestmark = pytest.mark.slow

DEMO = Path(latentcache.__file__).parent / "demo" / "weights"
SIDE = 64
NUM_IMAGES = 9  # over three shards, the last of which has a broken one besides


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    # Small pictures gain nothing from more, which on a busy machine wait for each other.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def image(index: int) -> Image.Image:
    return draw(SIDE, SIDE, index)


def write_copy(
    folder: Path, noise: float, half: str = "decoder.", skip: tuple[str, ...] = ()
) -> Path:
    """The demo VAE with noise in one half's weights."""
    state = load_file(DEMO / "diffusion_pytorch_model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in state.items():
        if name.startswith(half) and not name.startswith(skip):
            tensor += noise * tensor.abs().mean() * torch.randn(tensor.shape, generator=generator)
    return write_folder(folder, json.loads((DEMO / "config.json").read_text()), state)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, two copies of the demo VAE with worse decoders, and networks."""
    folder = tmp_path_factory.mktemp("eval")
    for shard in range(3):
        members = [(f"{i}.png", png(SIDE, SIDE, i)) for i in range(3 * shard, 3 * shard + 3)]
        write_tar(folder / "src" / f"{shard}.tar", members)
    members += [("bad.jpg", b"no image"), ("none.txt", b"no image at all")]
    write_tar(folder / "src" / "2.tar", members)
    write_copy(folder / "noisy", 0.1)
    write_copy(folder / "noisier", 0.3)
    write_inception(folder / "inception.pt")
    write_lpips(folder / "lpips.pt")
    write_vgg16(folder / "vgg16.pth")
    return folder


@pytest.fixture
def tree(folder: Path, tmp_path: Path) -> dict[str, Any]:
    return make_tree(folder, tmp_path)


def make_tree(folder: Path, output: Path) -> dict[str, Any]:
    """A config of three decoders with all networks, on the CPU."""
    return {
        "name": "drawn | pictures",
        "source": {"shards": f"{folder}/src/*.tar"},
        "resolution_px": SIDE,
        "vae": {"checkpoint": "demo"},
        "models": [
            {
                "name": "original",
                "checkpoint": "demo",
                "train_steps": 246803,
                "link": "https://example.org/vae",
                "comments": "as it comes | no\nchange",
            },
            {"name": "noisy", "checkpoint": f"{folder}/noisy"},
            {"name": "noisier", "checkpoint": f"{folder}/noisier", "train_steps": 0},
        ],
        "networks": {
            "inception": named(folder / "inception.pt"),
            "lpips": named(folder / "lpips.pt"),
            "vgg16": named(folder / "vgg16.pth"),
        },
        "output": {"url": f"{output}/out"},
        "compute": {"num_gpus": 0, "batch_size": 2},
    }


def config_of(tree: dict[str, Any]) -> EvalConfig:
    return EvalConfig.model_validate(tree)


def evaluated(tree: dict[str, Any]) -> Evaluation:
    return evaluate(plan_evaluation(config_of(tree)))


def write(tree: dict[str, Any], folder: Path) -> Path:
    path = folder / "eval.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def cells(line: str) -> list[str]:
    """The cells of a Markdown row."""
    escaped = line.replace(r"\|", "\0").strip("|").split("|")
    return [cell.strip().replace("\0", "|") for cell in escaped]


# What is measured.


@pytest.fixture(scope="module")
def reconstructions(folder: Path) -> dict[str, Pixels]:
    """What each model makes of each image, uint8 [N, H, W, 3], one at a time; `source` first."""
    images = np.stack([np.asarray(image(index)) for index in range(NUM_IMAGES)])
    encoder = load_vae("demo")
    made = {"source": images}
    for name, url in {"original": "demo", "noisy": "noisy", "noisier": "noisier"}.items():
        decoder = load_vae(url if url == "demo" else str(folder / url))
        decoded = []
        with torch.inference_mode():
            for pixels in images:
                moments = encoder.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None])
                decoded.append(to_uint8(decoder.decode(moments[:, :16]))[0])
        made[name] = torch.stack(decoded).permute(0, 2, 3, 1).numpy()
    return made


@dataclass(frozen=True, slots=True)
class Made:
    """What the command said and wrote."""

    result: Result
    folder: Path


@pytest.fixture(scope="module")
def made(cli: Cli, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    home = tmp_path_factory.mktemp("made")
    tree = make_tree(folder, home) | {"picture_rows": 4}
    result = cli.with_env(OMP_NUM_THREADS="1")("eval", write(tree, home), "--json")
    assert result.code == 0, result.stderr
    return Made(result, home / "out")


def test_figures_match_reference_implementations(
    made: Made, folder: Path, reconstructions: dict[str, Pixels]
):
    actual = made.result.json
    assert actual["num_images"] == NUM_IMAGES
    assert actual["rejects"] == {"decode: not_an_image": 1, "read: no_image": 1}
    source = reconstructions["source"]
    inception, lpips = (load_script(folder / f"{name}.pt") for name in ("inception", "lpips"))

    def features(images: Pixels) -> np.ndarray:
        with torch.inference_mode():
            actual: Tensor = inception(as_tensor(images), return_features=True)
        return actual.double().numpy()

    def lpips_features(images: Pixels) -> np.ndarray:
        with torch.inference_mode():
            actual: Tensor = lpips(
                as_tensor(images).float(), resize_images=False, return_lpips=True
            )
        return actual.double().numpy()

    for model in actual["models"]:
        decoded = reconstructions[model["name"]]
        pairs = list(zip(source, decoded, strict=True))
        lpips_distances = np.square(lpips_features(source) - lpips_features(decoded)).sum(axis=1)
        measured = {
            "psnr_db": [peak_signal_noise_ratio(a, b, data_range=255) for a, b in pairs],
            "ssim": [ssim_by_skimage(a, b) for a, b in pairs],
            "lpips": lpips_distances.tolist(),
            "psim": psim_by_modules(folder / "vgg16.pth", source, decoded),
        }
        for name, values in measured.items():
            # A batch may round a pixel otherwise than an image alone.
            assert model[name]["mean"] == pytest.approx(np.mean(values), rel=2e-3), name
            assert model[name]["std"] == pytest.approx(np.std(values), rel=2e-2), name
        expected = frechet_by_singular_values(features(source), features(decoded))
        assert model["rfid"] == pytest.approx(expected, rel=2e-2)
    psnrs = [model["psnr_db"]["mean"] for model in actual["models"]]
    assert psnrs == sorted(psnrs, reverse=True), "more noise, worse pictures"


def test_written_files_have_the_figures_of_the_command(
    made: Made, reconstructions: dict[str, Pixels]
):
    actual, out = made.result.json, made.folder
    assert sorted(path.name for path in out.iterdir()) == [
        f"evaluation.{suffix}" for suffix in ("json", "md", "png")
    ]
    assert json.loads((out / "evaluation.json").read_text()) == actual
    assert actual["output"] == f"file://{out}"

    heading, blank, *table = (out / "evaluation.md").read_text().splitlines()
    assert (heading, blank) == ("### drawn | pictures (64x64, 9 images)", "")
    columns = "Model, train steps, rFID, PSNR, SSIM, PSIM, LPIPS, Link, Comments"
    assert cells(table[0]) == columns.split(", ")
    assert {len(line) for line in table[:5]} == {len(table[0])}, "it is aligned"
    for line, model in zip(table[2:5], actual["models"], strict=True):
        row = dict(zip(columns.split(", "), cells(line), strict=True))
        assert row["Model"] == model["name"]
        assert row["rFID"] == f"{model['rfid']:.2f}"
        for name, digits in {"psnr_db": 1, "ssim": 2, "psim": 2, "lpips": 3}.items():
            mean, std = model[name]["mean"], model[name]["std"]
            column = name.removesuffix("_db").upper()
            assert row[column] == f"{mean:.{digits}f} ± {std:.{digits}f}"
    first, *others = (cells(line) for line in table[2:5])
    assert first[1:2] + first[7:] == [
        *("246803", "https://example.org/vae", "as it comes | no change"),
    ]
    assert [row[1] for row in others] == ["", "0"]
    assert table[6:] == [
        "- 2 samples were rejected: decode: not_an_image (1), read: no_image (1).",
        "- rFID is from 9 images, fewer than its 2048 features: it is too high, and comparable "
        "only on the same images.",
    ]

    # Four rows over three shards: one, one and two of their first images.
    assert actual["picture_keys"] == ["0", "3", "6", "7"]
    with Image.open(out / "evaluation.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    top = pixels.shape[0] - 4 * (SIDE + 4)
    assert pixels.shape[1] == 4 * (SIDE + 4) + 4
    for row, index in enumerate((0, 3, 6, 7)):
        for column, name in enumerate(("source", "original", "noisy", "noisier")):
            y, x = top + row * (SIDE + 4), 4 + column * (SIDE + 4)
            panel = pixels[y : y + SIDE, x : x + SIDE]
            # Batches may round a pixel otherwise than an image alone.
            assert np.abs(panel - reconstructions[name][index]).max() <= 1, (name, index)
    labels = pixels[:top].min(axis=(0, 2)) < 128
    for column in range(4):
        assert labels[4 + column * (SIDE + 4) :][:SIDE].any(), "a label stands above each column"


def test_columns_without_network_are_empty_with_a_note(
    cli: Cli, tree: dict[str, Any], tmp_path: Path
):
    del tree["networks"]
    del tree["models"][1:]
    tree["picture_rows"] = 0
    shown = cli("eval", write(tree, tmp_path))
    assert shown.code == 0, shown.stderr
    row = cells(shown.stdout.splitlines()[4])
    assert [row[2], row[5], row[6]] == ["", "", ""]
    assert all("±" in row[column] for column in (3, 4))
    notes = [line for line in shown.stdout.splitlines() if "is empty" in line]
    assert notes == [
        "- rFID is empty: networks.inception is not given.",
        "- LPIPS is empty: networks.lpips is not given.",
        "- PSIM is empty: networks.vgg16 is not given.",
    ]
    assert "fewer than" not in shown.stdout
    assert f"written to file://{tmp_path}/out" in shown.stdout
    assert not (tmp_path / "out" / "evaluation.png").exists()


def test_images_are_resized_and_center_cropped(tree: dict[str, Any], tmp_path: Path):
    """A flat picture with another half beside it: what is cropped away does not count."""
    wide = Image.new("RGB", (4 * SIDE, 2 * SIDE), "gray")
    wide.paste(image(0), (0, 0))  # left of the centre, but for a part
    write_tar(tmp_path / "src" / "0.tar", [("a.png", encode_image(wide))])
    tree["source"]["shards"] = f"{tmp_path}/src/0.tar"
    del tree["networks"], tree["models"][1:]
    assert evaluated(tree).num_images == 1
    with Image.open(tmp_path / "out" / "evaluation.png") as picture:
        left = picture.crop((4, picture.height - SIDE - 4, 4 + SIDE, picture.height - 4))
    expected = wide.resize((2 * SIDE, SIDE), Image.Resampling.BICUBIC)
    expected = expected.crop((SIDE // 2, 0, SIDE // 2 + SIDE, SIDE))
    assert np.abs(np.asarray(left).astype(int) - np.asarray(expected).astype(int)).max() <= 2


# Sharing the work out.


def numbers(actual: Evaluation) -> list[float]:
    """The figures that need no network."""
    spreads = [spread for model in actual.models for spread in (model.psnr_db, model.ssim)]
    return [value for spread in spreads for value in (spread.mean, spread.std)]


def test_figures_do_not_depend_on_the_number_of_shards(tree: dict[str, Any], tmp_path: Path):
    del tree["networks"], tree["models"][::2]
    shared = numbers(evaluated(tree))
    members = [(f"{i}.png", png(SIDE, SIDE, i)) for i in range(NUM_IMAGES)]
    write_tar(tmp_path / "src" / "all.tar", members)
    tree["source"]["shards"] = f"{tmp_path}/src/all.tar"
    tree["compute"]["batch_size"] = 1
    assert numbers(evaluated(tree)) == pytest.approx(shared, rel=1e-3)


def test_max_images_is_spread_over_the_shards(tree: dict[str, Any]):
    del tree["networks"], tree["models"][1:]
    tree["picture_rows"] = 64
    for most, keys in {
        1: ["6"],
        4: ["0", "3", "6", "7"],
        6: ["0", "1", "3", "4", "6", "7"],
        90: [str(index) for index in range(9)],
    }.items():
        actual = evaluated(tree | {"max_images": most})
        assert (actual.num_images, actual.picture_keys) == (len(keys), keys)


def test_one_image_has_no_rfid(tree: dict[str, Any]):
    del tree["models"][1:]
    actual = evaluated(tree | {"max_images": 1})
    assert actual.models[0].rfid is None
    assert actual.models[0].psnr_db.std == 0
    assert "rFID is empty: it needs at least two images." in actual.notes


def test_progress_is_reported_after_each_shard(tree: dict[str, Any]):
    del tree["networks"], tree["models"][1:]
    steps: list[tuple[int, int]] = []
    plan = plan_evaluation(config_of(tree))
    evaluate(plan, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(0, 3), (1, 3), (2, 3), (3, 3)]


def tree_on(server: S3Server, checkpoint: Path, endpoint_url: str, output: str) -> dict[str, Any]:
    """A config over the tests' corpus."""
    storage = {"endpoint_url": endpoint_url}
    return {
        "name": "corpus",
        "source": {"shards": "s3://photos/*.tar", "storage": storage},
        "resolution_px": SIDE,
        "vae": {"checkpoint": str(checkpoint)},
        "models": [{"name": "tiny", "checkpoint": str(checkpoint)}],
        "output": {"url": server.make_bucket(output), "storage": storage},
        "compute": {"num_gpus": 0, "num_cpu_actors": 2, "batch_size": 4},
    }


def assert_is_of_the_corpus(actual: dict[str, Any], corpus: list[Shard]) -> None:
    assert actual["num_images"] == sum(len(shard.rows) for shard in corpus)
    assert sum(actual["rejects"].values()) == sum(len(shard.rejects) for shard in corpus)


def is_actor(pid: int) -> bool:
    return b"_CallingActor" in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_actors_share_the_shards_and_a_killed_actor_is_replaced(
    moto: S3Server,
    proxy: FaultyProxy,
    ray_cli: Cli,
    checkpoint: Path,
    corpus: list[Shard],
    tmp_path: Path,
):
    tree = tree_on(moto, checkpoint, proxy.endpoint_url, "eval-actors")
    gate = proxy.gate(r"photos/04\.tar")
    cut = proxy.on("GET", r"photos/01\.tar", cut_halfway)
    command = ray_cli.start("eval", write(tree, tmp_path), "--json")
    command.wait_until_it_is_at(gate)
    assert is_actor(gate.client_pid)
    os.kill(gate.client_pid, signal.SIGKILL)
    gate.open()
    result = command.result()
    assert result.code == 0, result.stderr
    assert cut.num_fired == 1
    assert_is_of_the_corpus(result.json, corpus)

    # In this process, nothing going wrong.
    tree["source"]["storage"]["endpoint_url"] = moto.endpoint_url
    undisturbed = asdict(evaluated(tree))
    assert undisturbed["rejects"] == result.json["rejects"]
    assert undisturbed["picture_keys"] == result.json["picture_keys"]
    (alone,), (shared,) = undisturbed["models"], result.json["models"]
    for name in ("psnr_db", "ssim"):
        assert shared[name]["mean"] == pytest.approx(alone[name]["mean"], rel=1e-3)


def test_error_of_an_actor_is_one_line(cli: Cli, tree: dict[str, Any], tmp_path: Path):
    tree["networks"]["vgg16"]["sha256"] = "0" * 64
    tree["compute"]["num_cpu_actors"] = 2
    result = cli("eval", write(tree, tmp_path), "--json")
    assert result.code == result.json["exit_code"] == 2, result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    line = result.stderr
    assert "vgg16.pth is not the expected file" in line
    assert list((tmp_path / "out").iterdir()) == []


def test_ctrl_c_stops_eval_without_output(
    moto: S3Server, proxy: FaultyProxy, ray_cli: Cli, checkpoint: Path, tmp_path: Path
):
    tree = tree_on(moto, checkpoint, proxy.endpoint_url, "eval-ctrl-c")
    tree["compute"]["num_cpu_actors"] = 1
    gate = proxy.gate(r"photos/04\.tar")
    command = ray_cli.start("eval", write(tree, tmp_path), "--json")
    command.wait_until_it_is_at(gate)
    assert gate.client_pid == command.process.pid, "one CPU actor needs no Ray"
    command.process.send_signal(signal.SIGINT)
    result = command.result()
    assert (result.code, result.json["error"]) == (1, "interrupted")
    assert moto.listing("eval-ctrl-c") == {}


# What is refused, and what is accepted with a word.


def test_decoder_of_another_family_is_refused(tree: dict[str, Any], tmp_path: Path):
    tiny = write_diffusers_folder(tmp_path / "four")
    tree["models"][2]["checkpoint"] = str(tiny)
    with pytest.raises(ConfigError, match=r"noisier .* another family: its latent_channels is 4"):
        evaluated(tree)
    fields = {"block_out_channels": [32, 32], "layers_per_block": 1, "latent_channels": 16}
    half = write_diffusers_folder(tmp_path / "half", fields)
    tree["models"][2]["checkpoint"] = str(half)
    with pytest.raises(ConfigError, match="downsample_factor is 2, that of the latents is 8"):
        evaluated(tree)


def test_decoder_of_another_encoder_is_refused(tree: dict[str, Any], tmp_path: Path):
    other = write_diffusers_folder(tmp_path / "other", TINY_KL_F8 | {"latent_channels": 16})
    tree["models"][1]["checkpoint"] = str(other)
    with pytest.raises(ConfigError, match=r"noisy belongs to another encoder.* 50 dB are required"):
        evaluated(tree)
    worse = write_copy(tmp_path / "worse", 0.05, half="encoder.")
    tree["models"][1]["checkpoint"] = str(worse)
    with pytest.raises(ConfigError, match="noisy belongs to another encoder"):
        evaluated(tree)


def test_decoder_whose_encoder_agrees_is_accepted_with_a_note(tree: dict[str, Any], tmp_path: Path):
    near = write_copy(tmp_path / "near", 1e-4, half="encoder.")
    tree["models"] = [tree["models"][0], {"name": "near", "checkpoint": str(near)}]
    del tree["networks"]
    actual = evaluated(tree)
    (note,) = (note for note in actual.notes if "encoder" in note)
    assert note.startswith("near has its own encoder, which agrees with that of `vae` to ")
    assert actual.models[0].psnr_db == actual.models[1].psnr_db, "the decoders are the same"


def test_decoder_that_returns_nan_is_refused(tree: dict[str, Any], tmp_path: Path):
    state = load_file(DEMO / "diffusion_pytorch_model.safetensors")
    state["decoder.conv_in.weight"] = torch.full_like(state["decoder.conv_in.weight"].float(), 3e38)
    broken = write_folder(tmp_path / "x", json.loads((DEMO / "config.json").read_text()), state)
    tree["models"][1]["checkpoint"] = str(broken)
    with pytest.raises(CheckpointError, match="noisy decodes to values that are not finite"):
        evaluated(tree)


def test_source_without_images_is_an_error(tree: dict[str, Any], tmp_path: Path):
    write_tar(tmp_path / "src" / "0.tar", [("a.png", b"no"), ("b.png", b"nor this")])
    tree["source"]["shards"] = f"{tmp_path}/src/0.tar"
    with pytest.raises(SourceError, match=r"none of .* could be read: decode: not_an_image \(2\)"):
        evaluated(tree)
    assert not list((tmp_path / "out").iterdir())


def test_unusable_source_or_output_fails_in_the_plan(tree: dict[str, Any]):
    tree["networks"]["vgg16"]["url"] = "/nowhere/at/all"  # not looked at yet
    with pytest.raises(StorageError, match="/proc/nowhere"):
        plan_evaluation(config_of(tree | {"output": {"url": "/proc/nowhere"}}))
    with pytest.raises(SourceError, match=r"none\.tar does not exist"):
        plan_evaluation(config_of(tree | {"source": {"shards": "/none.tar"}}))


MISTAKES = {
    "models.0.chekpoint": "unknown setting; did you mean 'checkpoint'?",
    "models.0.storage.endpoint": "unknown setting; did you mean 'endpoint_url'?",
    "networks.vgg": "unknown setting; did you mean 'vgg16'?",
    "networks.lpips.sha": "unknown setting; did you mean 'sha256'?",
    "source.keep": "unknown setting; did you mean 'key'?",
    "transform": "unknown setting; this section has: name, source, resolution_px, vae, models",
    "compute.precision": "unknown setting; this section has: num_gpus, num_cpu_actors, batch_size",
}


@pytest.mark.parametrize("path", MISTAKES)
def test_unknown_settings_are_named_by_path(tree: dict[str, Any], tmp_path: Path, path: str):
    *sections, name = path.split(".")
    section: Any = tree
    for part in sections:
        section = section[int(part)] if part.isdigit() else section.setdefault(part, {})
    section[name] = "x"
    with pytest.raises(ConfigError) as caught:
        load_eval_config(write(tree, tmp_path))
    lines = [line for line in str(caught.value).splitlines() if f": {path}: " in line]
    assert len(lines) == 1
    assert MISTAKES[path] in lines[0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("models=[]", "models: "),
        (
            "models=[{name: a, checkpoint: x}, {name: a, checkpoint: y}]",
            "two models have the same name",
        ),
        ("networks.lpips.sha256=ABC", "networks.lpips.sha256: "),
        ("max_images=0", "max_images: "),
        ("resolution_px=100", "resolution_px: "),
        ("compute.batch_size=0", "compute.batch_size: "),
        ("picture_rows=65", "picture_rows: "),
    ],
)
def test_wrong_values_are_named_by_path(
    tree: dict[str, Any], tmp_path: Path, override: str, message: str
):
    with pytest.raises(ConfigError) as caught:
        load_eval_config(write(tree, tmp_path), [override])
    (line,) = str(caught.value).splitlines()
    assert message in line


def test_labels_stay_within_their_columns():
    picture = Picture("key", np.zeros((2, 3, 32, 32), np.uint8))
    png = draw_side_by_side(["a name that is much too long for 32 px"], [picture])
    with Image.open(BytesIO(png)) as drawn:
        pixels = np.asarray(drawn.convert("L"))
    assert pixels.shape[1] == 2 * (32 + 4) + 4
    top = pixels.shape[0] - 36
    assert (pixels[:top, [0, 1, 38, 39, -1]] == 255).all(), "the gaps are free of ink"
    assert (pixels[:top, 40:72] < 128).any()
