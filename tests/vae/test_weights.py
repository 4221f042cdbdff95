"""Checkpoints as they are found: every layout and spelling, and every kind of damage."""

from __future__ import annotations

import collections
import io
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoints import (
    KL_F8,
    TINY_KL_F8,
    make_reference,
    spell_attention,
    to_compvis,
    write_compvis_checkpoint,
    write_diffusers_folder,
    write_folder,
)
from latentcache.errors import CheckpointError, ConfigError
from latentcache.vae.model import KLAutoencoder
from latentcache.vae.weights import encoder_fingerprint, load_vae

REFERENCE = make_reference(TINY_KL_F8)
STATE = dict(REFERENCE.state_dict())
CONFIG = dict(REFERENCE.config)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> KLAutoencoder:
    """The VAE that every checkpoint here should load as."""
    return load_vae(str(write_diffusers_folder(tmp_path_factory.mktemp("vae"))))


def assert_same(vae: KLAutoencoder, expected: KLAutoencoder) -> None:
    """Same sizes, tensors, fingerprint and output."""
    factor = expected.architecture.scaling_factor
    assert replace(vae.architecture, scaling_factor=factor) == expected.architecture
    assert encoder_fingerprint(vae) == encoder_fingerprint(expected)
    images = torch.arange(3 * 32 * 32, dtype=torch.int64).remainder(251).to(torch.uint8)
    moments = vae.encode(images.reshape(1, 3, 32, 32))
    assert torch.equal(moments, expected.encode(images.reshape(1, 3, 32, 32)))
    assert torch.equal(vae.decode(moments[:, :4]), expected.decode(moments[:, :4]))


class Callback:
    """Lightning keys its callbacks' states by their classes."""


class HyperParameters(dict[str, Any]):
    """What a trainer may leave in a checkpoint: a class of its own, with state."""

    def __init__(self) -> None:
        super().__init__(lr=4.5e-6)
        self.history = [collections.Counter("ab"), {Callback}]


def lightning(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.Adam([weight])
    weight.sum().backward()
    optimizer.step()
    return {
        "epoch": 4,
        "state_dict": state | {"loss.logvar": torch.zeros(()), "loss.d.0.weight": torch.ones(3)},
        "callbacks": {Callback: {"best": Callback(), "dirpath": Path("/somewhere")}},
        "optimizer_states": [optimizer.state_dict()],
        "hyper_parameters": HyperParameters(),
    }


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("spelling", ["new", "new conv", "old", "old conv"])
def test_old_and_new_diffusers_parameter_names(
    tmp_path: Path, expected: KLAutoencoder, spelling: str, suffix: str
) -> None:
    folder = write_folder(tmp_path, CONFIG, spell_attention(STATE, spelling), suffix=suffix)
    assert_same(load_vae(str(folder)), expected)


def test_absent_fields_take_diffusers_defaults(tmp_path: Path, expected: KLAutoencoder) -> None:
    fields = {"block_out_channels": CONFIG["block_out_channels"]}
    vae = load_vae(str(write_folder(tmp_path, fields, STATE)))
    assert_same(vae, expected)
    assert vae.architecture.scaling_factor == 0.18215


def test_pipeline_folder_and_single_file(tmp_path: Path, expected: KLAutoencoder) -> None:
    write_folder(tmp_path / "vae", CONFIG, STATE)
    (tmp_path / "model_index.json").write_text("{}")
    assert_same(load_vae(str(tmp_path)), expected)
    assert_same(load_vae(f"{tmp_path}/vae/diffusion_pytorch_model.safetensors"), expected)
    assert_same(load_vae((tmp_path / "vae").as_uri()), expected)


@pytest.mark.parametrize("name", ["vae.safetensors", "vae.ckpt", "vae.pt"])
def test_compvis_files(tmp_path: Path, expected: KLAutoencoder, name: str) -> None:
    assert_same(load_vae(str(write_compvis_checkpoint(tmp_path / name))), expected)


def test_compvis_zip(tmp_path: Path, expected: KLAutoencoder) -> None:
    model = write_compvis_checkpoint(tmp_path / "model.ckpt")
    with zipfile.ZipFile(tmp_path / "kl-f8.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(model, "model.ckpt")
    assert_same(load_vae(f"{tmp_path}/kl-f8.zip"), expected)


@pytest.mark.parametrize("modern", [True, False], ids=["zip", "legacy"])
def test_lightning_checkpoint(tmp_path: Path, expected: KLAutoencoder, modern: bool) -> None:
    path = tmp_path / "last.ckpt"
    torch.save(lightning(to_compvis(STATE)), path, _use_new_zipfile_serialization=modern)
    assert_same(load_vae(str(path)), expected)


def test_whole_stable_diffusion_checkpoint(tmp_path: Path, expected: KLAutoencoder) -> None:
    state = {f"first_stage_model.{name}": tensor for name, tensor in to_compvis(STATE).items()}
    state["first_stage_model.loss.logvar"] = torch.zeros(())
    state["model.diffusion_model.out.0.weight"] = torch.zeros(3)
    state["model_ema.num_updates"] = torch.zeros((), dtype=torch.int64)
    state["betas"] = torch.zeros(1000)
    torch.save(lightning(state), tmp_path / "sd.ckpt")
    actual = load_vae(f"{tmp_path}/sd.ckpt")
    assert_same(actual, expected)
    assert actual.architecture.scaling_factor == 0.18215
    state["conditioner.embedders.0.weight"] = torch.zeros(3)
    safetensors.torch.save_file(state, tmp_path / "sdxl.safetensors")
    assert load_vae(f"{tmp_path}/sdxl.safetensors").architecture.scaling_factor == 0.13025


def test_a_config_beside_a_compvis_file_determines_the_architecture(tmp_path: Path) -> None:
    fields = TINY_KL_F8 | {"latent_channels": 16, "scaling_factor": 0.3611, "use_quant_conv": False}
    path = write_compvis_checkpoint(tmp_path / "ae.safetensors", fields)
    assert load_vae(str(path)).architecture.scaling_factor is None
    folder = write_diffusers_folder(tmp_path, fields)
    assert load_vae(str(path)).architecture.scaling_factor == 0.3611
    assert encoder_fingerprint(load_vae(str(path))) == encoder_fingerprint(load_vae(str(folder)))


def test_a_vae_of_published_size_in_both_layouts(tmp_path: Path) -> None:
    state = dict(make_reference(KL_F8).state_dict())
    vae = load_vae(str(write_folder(tmp_path, KL_F8, state)), decoder=False)
    torch.save({"state_dict": to_compvis(state)}, tmp_path / "kl-f8.ckpt")
    original = load_vae(f"{tmp_path}/kl-f8.ckpt", decoder=False)
    assert encoder_fingerprint(original) == encoder_fingerprint(vae)
    assert replace(original.architecture, scaling_factor=0.18215) == vae.architecture


def test_loads_from_an_object_store(
    tmp_path: Path, expected: KLAutoencoder, memory_store: None
) -> None:
    memory = fsspec.filesystem("memory")
    for file in write_diffusers_folder(tmp_path).iterdir():
        memory.pipe_file(f"/models/vae/{file.name}", file.read_bytes())
    assert_same(load_vae("memory://models"), expected)
    assert_same(load_vae("memory://models/vae"), expected)
    with pytest.raises(CheckpointError, match=r"memory://models/other/config\.json does not exist"):
        load_vae("memory://models/other")


def test_without_decoder(tmp_path: Path, expected: KLAutoencoder) -> None:
    for path in (write_diffusers_folder(tmp_path), write_compvis_checkpoint(tmp_path / "v.ckpt")):
        vae = load_vae(str(path), decoder=False)
        assert not [name for name, _ in vae.named_parameters() if "decoder" in name]
        assert encoder_fingerprint(vae) == encoder_fingerprint(expected)


def test_half_precision_weights_become_float32(tmp_path: Path) -> None:
    half = {name: tensor.half() for name, tensor in STATE.items()}
    vae = load_vae(str(write_folder(tmp_path / "half", CONFIG, half)))
    rounded = {name: tensor.float() for name, tensor in half.items()}
    assert_same(vae, load_vae(str(write_folder(tmp_path / "rounded", CONFIG, rounded))))
    with pytest.raises(ConfigError, match="float32"):
        encoder_fingerprint(load_vae(str(tmp_path / "half"), dtype=torch.float16))


def test_the_fingerprint_changes_only_with_the_encoder(
    tmp_path: Path, expected: KLAutoencoder
) -> None:
    def fingerprint_with(changed: str, config: dict[str, Any] = CONFIG) -> str:
        state = {name: tensor.clone() for name, tensor in STATE.items()}
        if changed:
            state[changed].view(-1)[-1] += 1e-3
        return encoder_fingerprint(load_vae(str(write_folder(tmp_path, config, state))))

    fingerprint = encoder_fingerprint(expected)
    for name in ("decoder.conv_out.bias", "post_quant_conv.weight"):
        assert fingerprint_with(name) == fingerprint
    for name in ("encoder.conv_in.weight", "encoder.mid_block.attentions.0.to_q.weight"):
        assert fingerprint_with(name) != fingerprint
    assert fingerprint_with("quant_conv.bias") != fingerprint
    assert fingerprint_with("", CONFIG | {"norm_num_groups": 16}) != fingerprint
    assert fingerprint_with("", CONFIG | {"scaling_factor": 1.0}) == fingerprint


class Malicious:
    """Touches a file when a pickle of it is loaded the ordinary way."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
def test_a_malicious_pickle_runs_nothing(
    tmp_path: Path, expected: KLAutoencoder, form: str
) -> None:
    target, path = tmp_path / "harmed", tmp_path / "model.ckpt"
    content = {"state_dict": to_compvis(STATE), "evil": Malicious(target)}
    if form == "bare":
        path.write_bytes(pickle.dumps(Malicious(target), protocol=2))
        with pytest.raises(CheckpointError, match=r"model\.ckpt"):
            load_vae(str(path))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
        assert_same(load_vae(str(path)), expected)
    assert not target.exists()
    pickle.loads(pickle.dumps(Malicious(target)))
    assert target.exists()  # so the pickle was a working one


def replaced(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return STATE | {name: tensor}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({k: v for k, v in STATE.items() if k != "quant_conv.bias"}, r"lacks quant_conv\.bias"),
        ({k: v for k, v in STATE.items() if "mid" not in k}, r"lacks .* and \d+ more tensors"),
        (replaced("encoder.extra.weight", torch.zeros(1)), r"has encoder\.extra\.weight that"),
        (
            replaced("encoder.conv_in.bias", torch.zeros(7)),
            r"encoder\.conv_in\.bias \(float32 \[7\], not \[32\]\)",
        ),
        (
            replaced("encoder.conv_in.bias", torch.zeros(32, dtype=torch.int8)),
            r"encoder\.conv_in\.bias \(int8 \[32\]",
        ),
        (replaced("quant_conv.bias", torch.full((8,), torch.nan)), r"NaN .* quant_conv\.bias"),
    ],
    ids=["missing", "many-missing", "surplus", "misshapen", "integers", "nan"],
)
def test_errors_name_the_tensors_that_do_not_fit(
    tmp_path: Path, state: dict[str, torch.Tensor], message: str
) -> None:
    folder = write_folder(tmp_path, CONFIG, state)
    with pytest.raises(CheckpointError, match=message):
        load_vae(str(folder))


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>Log in</html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"weights, I promise", "download it again"),
    ],
    ids=["empty", "html", "lfs", "text"],
)
def test_errors_describe_files_that_are_not_checkpoints(
    tmp_path: Path, content: bytes, message: str, suffix: str
) -> None:
    folder = write_folder(tmp_path, CONFIG, {"a": torch.zeros(1)}, suffix=suffix)
    (folder / f"diffusion_pytorch_model{suffix}").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"diffusion_pytorch_model\{suffix}.*{message}"):
        load_vae(str(folder))


def test_errors_name_missing_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere/config\.json does not exist"):
        load_vae(f"{tmp_path}/nowhere")
    with pytest.raises(CheckpointError, match=r"nothing\.ckpt.*vae\.checkpoint"):
        load_vae(f"{tmp_path}/nothing.ckpt")
    folder = write_folder(tmp_path, CONFIG, STATE)
    (folder / "config.json").rename(folder / "other.json")
    with pytest.raises(CheckpointError, match=r"put its config\.json beside it"):
        load_vae(f"{folder}/diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text("<html>")
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON"):
        load_vae(str(folder))
    (folder / "config.json").write_text("{}")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="download the weights"):
        load_vae(str(folder))


def test_torchscript_and_zips_with_two_checkpoints_are_refused(tmp_path: Path) -> None:
    for members, message in (
        (["a/data.pkl", "a/constants.pkl"], "TorchScript"),
        (["a.ckpt", "b.ckpt"], "holds 2 checkpoints"),
    ):
        with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
            for member in members:
                archive.writestr(member, b"")
        with pytest.raises(CheckpointError, match=message):
            load_vae(f"{tmp_path}/model.zip")


def small_file(form: str) -> bytes:
    """A checkpoint of two of a VAE's tensors in one of the three containers."""
    state = {"encoder.conv_out.weight": torch.zeros(8, 2), "encoder.down.0.x": torch.ones(3)}
    if form == "safetensors":
        return safetensors.torch.save(state)
    buffer = io.BytesIO()
    torch.save({"state_dict": state}, buffer, _use_new_zipfile_serialization=form == "zip")
    return buffer.getvalue()


SMALL_FILES = {form: small_file(form) for form in ("safetensors", "zip", "legacy")}


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(sorted(SMALL_FILES)), st.data())
def test_any_damage_is_a_checkpoint_error(tmp_path: Path, form: str, data: st.DataObject) -> None:
    """A file cut off anywhere, or with a bit changed, is a named error: whole, it lacks tensors."""
    content = bytearray(SMALL_FILES[form])
    where = data.draw(st.integers(0, len(content) - 1), label="where")
    if data.draw(st.booleans(), label="cut"):
        del content[where:]
    else:
        content[where] ^= data.draw(st.integers(1, 255), label="bits")
    path = tmp_path / ("vae.safetensors" if form == "safetensors" else "vae.ckpt")
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        load_vae(str(path))
