"""Another user's dataset: files that only it names stay closed, and the error says what to do."""

from __future__ import annotations

import builtins
import io
import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from checkpoints import write_diffusers_folder
from latentcache import Dataset, load_vae, open_dataset
from latentcache.dataset.contract import Contract
from latentcache.errors import ConfigError, DatasetError
from latentcache.qa.access import NamedSources, shown
from latentcache.qa.evaluator import QaModels
from latentcache.qa.gates import Gates
from latentcache.qa.qa_files import QaRow
from latentcache.qa.reevaluate import QaResult, Selection, reevaluate
from latentcache.qa.report import build_report
from latentcache.qa.sheet import load_decoder
from latentcache.vae.weights import encoder_fingerprint
from makers import (
    config_tree,
    make_contract,
    make_latents,
    make_qa_rows,
    png,
    write_dataset,
    write_tar,
)
from runs import Cli

SQUARE = (64, 64)


def contract_of(checkpoint: str) -> Contract:
    vae = load_vae(checkpoint)
    contract = make_contract(latent_channels=vae.architecture.latent_channels)
    fingerprint = encoder_fingerprint(vae)
    return replace(contract, vae=replace(contract.vae, encoder_fingerprint=fingerprint))


def make(
    folder: Path,
    names: str | None,
    source: str = "a.tar",
    contract: Contract | None = None,
    qa: list[QaRow] | None = None,
) -> Dataset:
    """A dataset whose contract names a checkpoint, and whose one unit names a source."""
    contract = contract or make_contract()
    latents = {SQUARE: make_latents(contract, SQUARE, 3)}
    rows = make_qa_rows(contract, SQUARE, 3) if qa is None else qa
    provenance = {"checkpoint": names} if names else {}
    write_dataset(folder, contract, {source: latents}, qa={source: rows}, provenance=provenance)
    return open_dataset(str(folder / "out"))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The local files that are opened from here on."""
    paths: list[str] = []
    for module, name in ((builtins, "open"), (io, "open"), (os, "open")):
        real = getattr(module, name)

        def open_(path: Any, *args: Any, real: Any = real, **kwargs: Any) -> Any:
            paths.append(str(path))
            return real(path, *args, **kwargs)

        monkeypatch.setattr(module, name, open_)
    return paths


def evaluate_again(
    dataset: Dataset, folder: Path, decoder: Path | None = None, **selected: Any
) -> QaResult:
    folder.mkdir(exist_ok=True)
    models = QaModels(decoder=decoder and str(decoder))
    return reevaluate(dataset, models, Selection(3, **selected), Gates(), folder)


def test_a_checkpoint_that_only_the_dataset_names_is_not_opened(
    tmp_path: Path, opened: list[str]
) -> None:
    vae = write_diffusers_folder(tmp_path / "vae")
    dataset = make(tmp_path, str(vae), contract=contract_of(str(vae)))
    opened.clear()
    for attempt in (
        lambda: load_decoder(dataset),
        lambda: evaluate_again(dataset, tmp_path / "qa"),
    ):
        with pytest.raises(ConfigError, match=rf"{vae} encoded it.*--decoder {vae},"):
            attempt()
    assert not [path for path in opened if path.startswith(str(vae))]
    assert load_decoder(dataset, str(vae))[1] == []
    seen = evaluate_again(dataset, tmp_path / "qa", vae)
    assert seen.files.records[0].qa
    assert [path for path in opened if path.startswith(str(vae))]  # so `opened` sees them


def test_demo_checkpoint_needs_no_option(tmp_path: Path) -> None:
    dataset = make(tmp_path, "demo", contract=contract_of("demo"))
    assert load_decoder(dataset)[1] == []
    assert evaluate_again(dataset, tmp_path / "qa").files.records[0].qa


@pytest.mark.parametrize("names", [None, "", 7, ["demo"], "./demo", "demo\n"])
def test_names_similar_to_demo_are_not_opened(tmp_path: Path, names: Any) -> None:
    with pytest.raises(ConfigError, match="--decoder") as caught:
        load_decoder(make(tmp_path, names))
    assert "\n" not in str(caught.value)


def test_decoder_with_another_encoder_does_not_replace_the_datasets_vae(tmp_path: Path) -> None:
    vae = write_diffusers_folder(tmp_path / "vae")
    dataset = make(tmp_path, "s3://another-user/vae", contract=contract_of("demo"))
    with pytest.raises(ConfigError, match=r"another encoder.*--checkpoint"):
        evaluate_again(dataset, tmp_path / "qa", vae)


def test_checkpoint_in_error_is_quoted_for_the_shell(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_decoder(make(tmp_path, "x'; touch harmed; '"))
    option = str(caught.value).partition("--decoder ")[2].partition(", or give")[0]
    assert shlex.split(option) == ["x'; touch harmed; '"]


def test_shown_urls_have_no_credentials() -> None:
    assert shown("https://me:secret@host/v.ckpt?X-Signature=abc") == "https://host/v.ckpt?…"
    assert shown("s3://b/v\x1b[2J\n.ckpt") == "s3://b/v\\x1b[2J .ckpt"
    assert len(shown("x" * 10_000)) < 400


# Sources.


def test_a_shard_that_only_the_dataset_names_is_not_read(tmp_path: Path, opened: list[str]) -> None:
    secret = write_tar(tmp_path / "private" / "0.tar", [("k0000.png", png(64, 64))])
    source = f"file://{secret}"
    dataset = make(tmp_path, "demo", source, contract_of("demo"))
    opened.clear()
    with pytest.raises(ConfigError, match=rf"{secret}: pass --source"):
        evaluate_again(dataset, tmp_path / "qa", num_units=1)
    seen = evaluate_again(
        dataset, tmp_path / "qa", num_units=1, sources=(f"{tmp_path}/mine/*.tar",)
    )
    assert any("only the dataset names" in note for note in seen.notes)
    assert not [path for path in opened if "private" in path]
    evaluate_again(dataset, tmp_path / "qa", num_units=1, sources=(f"{tmp_path}/private",))
    assert [path for path in opened if "private" in path]  # so `opened` sees them


NAMED = ("/data/photos", "s3://b/{0..2}.tar", "s3://b/set/*.tar", "hf://datasets/me/x")


@pytest.mark.parametrize(
    ("source", "is_named"),
    [
        ("file:///data/photos#3/64", True),
        ("file:///data/photos/deep/0.tar", True),
        ("s3://b/1.tar", True),
        ("s3://b/set/7.tar", True),
        ("hf://datasets/me/x/data/0.parquet", True),
        ("file:///data/photos2/0.tar", False),
        ("file:///data", False),
        ("file:///data/photos/../secret.tar", False),
        ("file:///data/photos/./0.tar", False),
        ("file:///data/photos//etc/0.tar", False),
        ("file:///data/photos/%2e%2e/0.tar", False),
        ("file:///data/photos/x://etc/passwd.tar", False),
        ("file:///data/photos/0.tar::http://evil/", False),
        ("file:///data/photos/../../etc#0/64", False),
        ("/data/photos/0.tar", False),
        ("s3://b/3.tar", False),
        ("s3://b/set/deep/7.tar", False),
        ("s3://b/set/7.parquet", False),
        ("http://b/set/7.tar", False),
        ("", False),
    ],
)
def test_named_sources_hold_only_what_the_user_names(source: str, is_named: bool) -> None:
    assert (source in NamedSources(NAMED)) == is_named


# Pictures.


def test_qa_pictures_that_are_not_png_are_refused(tmp_path: Path) -> None:
    """Pillow reads EPS, too, with a program that it starts."""
    contract = contract_of("demo")
    rows = make_qa_rows(contract, SQUARE, 3)
    eps = io.BytesIO()
    Image.new("RGB", SQUARE).save(eps, "EPS")
    assert Image.open(io.BytesIO(eps.getvalue())).format == "EPS"
    large = io.BytesIO()
    Image.new("RGB", (5000, 5000)).save(large, "PNG")
    for number, data in enumerate((eps.getvalue(), large.getvalue(), b"", rows[0].image[:60])):
        bad = [replace(rows[0], image=data), *rows[1:]]
        dataset = make(tmp_path / str(number), "demo", contract=contract, qa=bad)
        with pytest.raises(DatasetError, match="picture"):
            build_report(dataset, [], Gates())
        with pytest.raises(DatasetError, match="picture"):
            evaluate_again(dataset, tmp_path / f"qa{number}")


def test_qa_rows_of_another_bucket_are_refused(tmp_path: Path) -> None:
    contract = contract_of("demo")
    rows = [replace(row, bucket="99999x99999") for row in make_qa_rows(contract, SQUARE, 3)]
    dataset = make(tmp_path, "demo", contract=contract, qa=rows)
    with pytest.raises(DatasetError, match="99999x99999"):
        evaluate_again(dataset, tmp_path / "qa")
    with pytest.raises(DatasetError, match="99999x99999"):
        build_report(dataset, [], Gates())


# The command line.


def test_cli_errors_name_the_decoder_option(cli: Cli, tmp_path: Path) -> None:
    vae = write_diffusers_folder(tmp_path / "vae")
    contract = contract_of(str(vae))
    make(tmp_path, str(vae), contract=contract)
    url, image = tmp_path / "out", tmp_path / "sheet.png"
    result = cli("qa", url)
    assert result.code == 2
    assert len(result.stderr.splitlines()) == 1
    assert f"--decoder {vae}," in result.stderr
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(config_tree(tmp_path, vae={"checkpoint": str(vae)})))
    assert cli.ok("inspect", config, "--image", image)["num_rows"] == 3
