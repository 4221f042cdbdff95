"""Configs: the ones we ship, and every mistake is reported by its dotted path."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from latentcache import Config, load_config, make_plan, parse_config
from latentcache.config_eval import load_eval_config
from latentcache.errors import ConfigError
from makers import png, write_tar

FOLDER = Path(__file__).parents[1] / "configs"
EVAL_CONFIGS = sorted(FOLDER.glob("eval-*.yaml"))
CONFIGS = sorted(set(FOLDER.glob("*.yaml")) - set(EVAL_CONFIGS))

TREE: dict[str, Any] = {
    "name": "photos",
    "source": {"shards": "photos.tar"},
    "transform": {"resolution_px": 256},
    "vae": {"checkpoint": "demo"},
    "output": {"url": "latents"},
}


def with_setting(path: str, value: object) -> dict[str, Any]:
    tree = copy.deepcopy(TREE)
    *sections, name = path.split(".")
    section = tree
    for part in sections:
        section = section.setdefault(part, {})
    section[name] = value
    return tree


def complaints(tree: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(tree)
    return str(caught.value).splitlines()


@pytest.fixture(scope="module")
def local_source(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that point a config at a tiny checkpoint, one local shard and an empty folder."""
    folder = tmp_path_factory.mktemp("local")
    shard = write_tar(folder / "000000.tar", [("a.jpg", png(64, 64)), ("a.txt", b"a")])
    return [
        f"vae.checkpoint={checkpoint}",
        f"source.shards={shard}",
        f"output.url={folder / 'out'}",
    ]


def test_the_configs_that_the_readme_names_exist():
    assert {path.stem for path in CONFIGS} >= {
        "demo",
        "sd-vae-ft-mse-256",
        "sd-vae-ft-mse-512-buckets",
        "sdxl-1024-buckets",
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_plans_on_local_fixtures(path: Path, local_source: list[str]):
    config = load_config(path, local_source)
    plan = make_plan(config)
    assert [planned.reason for planned in plan.pending] == ["new"]
    assert plan.existing_contract is None
    assert not plan.diff
    contract = plan.contract
    assert contract.latents.dtype == config.latents.dtype
    assert contract.latents.format == config.latents.format
    squared = config.transform.resolution_px**2
    for width_px, height_px in contract.transform.buckets:
        assert width_px % 8 == height_px % 8 == 0
        assert 0.8 < width_px * height_px / squared < 1.25
        assert contract.latent_shape((width_px, height_px)) == (4, height_px // 8, width_px // 8)
    assert (len(contract.transform.buckets) > 1) == bool(config.transform.buckets)
    assert not list(plan.output.list()), "planning writes nothing"


@pytest.mark.parametrize("path", [*CONFIGS, *EVAL_CONFIGS], ids=lambda path: path.stem)
def test_a_shipped_config_has_no_secret_and_names_its_checkpoint(path: Path):
    text = path.read_text().lower()
    assert not any(word in text for word in ("secret", "password", "token", "access_key"))
    assert yaml.safe_load(text)["vae"]["checkpoint"]


TYPOS = {
    "sauce": "did you mean 'source'",
    "source.shard": "did you mean 'shards'",
    "source.images": "did you mean 'image'",
    "source.storage.endpoint": "did you mean 'endpoint_url'",
    "transform.resolution": "did you mean 'resolution_px'",
    "transform.bucket": "did you mean 'buckets'",
    "vae.checkpont": "did you mean 'checkpoint'",
    "vae.storage.anonymous": "did you mean 'anon'",
    "latents.posteriors": "did you mean 'posterior'",
    "latents.calibration.images": "did you mean 'num_images'",
    "qa.min_psnr": "did you mean 'min_psnr_db'",
    "output.uri": "did you mean 'url'",
    "output.storage.profil": "did you mean 'profile'",
    "rejects.maxrate": "did you mean 'max_rate'",
    "compute.num_gpu": "did you mean 'num_gpus'",
    "compute.batchsize": "did you mean 'batch_size'",
    "quux": "this section has: name, source, transform, vae, latents, output, rejects, compute",
}


@pytest.mark.parametrize("path", TYPOS)
def test_an_unknown_setting_is_reported_with_its_path_and_the_nearest_name(path: str):
    (line,) = complaints(with_setting(path, 1))
    assert line.startswith(f"config: {path}: unknown setting; ")
    assert TYPOS[path] in line


def test_an_unknown_setting_of_a_bucket_rule_is_reported():
    (line,) = complaints(with_setting("transform.buckets", {"max_ratio": 2, "step": 64}))
    assert line == "config: transform.buckets.step: unknown setting; did you mean 'step_px'?"


def test_all_mistakes_are_reported_at_once_one_line_each():
    tree = with_setting("transform.resolution_px", 250) | {"vea": {}}
    del tree["vae"]
    assert set(complaints(tree)) == {
        "config: vae: required, but missing",
        "config: transform.resolution_px: input should be a multiple of 8 (got 250)",
        "config: vea: unknown setting; did you mean 'vae'?",
    }


WRONG = [
    ("name", "", "name"),
    ("source", ["a.tar"], "source"),
    ("source.shards", 3, "source.shards"),
    ("source.shards", ["a.tar", 3], "source.shards.1"),
    ("source.image", "jpg", "source.image"),
    ("source.image", [], "source.image"),
    ("source.keep", ["latent"], "source.keep"),
    ("source.keep", ["txt", "caption"], "source.keep"),
    ("source.keep", ["txt", "txt"], "source.keep"),
    ("source.on_missing", "delete", "source.on_missing"),
    ("source.num_units", 8, "source"),
    ("source.folder", "photos", "source"),
    ("source", {}, "source"),
    ("source", {"folder": "photos", "num_units": 0}, "source.num_units"),
    ("source", {"folder": "photos", "key": "id"}, "source"),
    ("source.storage.anon", "maybe", "source.storage.anon"),
    ("transform.resolution_px", "wide", "transform.resolution_px"),
    ("transform.resolution_px", 100, "transform.resolution_px"),
    ("transform.resolution_px", 0, "transform.resolution_px"),
    ("transform.crop", "random", "transform.crop"),
    ("transform.buckets", [], "transform.buckets"),
    ("transform.buckets", [[256, 256], [256, 256]], "transform.buckets"),
    ("transform.buckets", [[256]], "transform.buckets.0.1"),
    ("transform.buckets", [[256, 256], [256, 250]], "transform.buckets.1.1"),
    ("transform.buckets", {"max_ratio": 0.5}, "transform.buckets.max_ratio"),
    ("transform.buckets", {"step_px": 64}, "transform.buckets.max_ratio"),
    ("transform.max_upscale", 0, "transform.max_upscale"),
    ("vae.checkpoint", None, "vae.checkpoint"),
    ("latents.dtype", "half", "latents.dtype"),
    ("latents.calibration", {"seed": 1}, "latents.calibration"),
    ("latents.calibration.num_images", 0, "latents.calibration.num_images"),
    ("latents.posterior", "mode", "latents.posterior"),
    ("latents.format", "webdataset", "latents.format"),
    ("output", {}, "output.url"),
    ("rejects.max_rate", 1.5, "rejects.max_rate"),
    ("compute.num_gpus", -1, "compute.num_gpus"),
    ("compute.batch_size", 0, "compute.batch_size"),
    ("compute.batch_size", "automatic", "compute.batch_size"),
    ("compute.decode_threads", 0.5, "compute.decode_threads"),
    ("compute.precision", "fp8", "compute.precision"),
]


@pytest.mark.parametrize(("path", "value", "expected"), WRONG)
def test_a_wrong_value_is_reported_with_its_path(path: str, value: object, expected: str):
    (line,) = complaints(with_setting(path, value))
    assert line.startswith(f"config: {expected}: ")
    assert "RatioBuckets[" not in line


@pytest.mark.parametrize("value", ["s3://b/{000000..000099}.tar", ["a.tar", "b.tar"]])
def test_shards_accepts_a_url_or_a_list(value: str | list[str]):
    assert parse_config(with_setting("source.shards", value)).source.shards == value


@pytest.mark.parametrize("value", ["auto", 7])
def test_batch_size_accepts_auto_or_a_count(value: str | int):
    assert parse_config(with_setting("compute.batch_size", value)).compute.batch_size == value


@pytest.mark.parametrize("tree", [None, [], "text", 3])
def test_a_config_that_is_not_a_mapping_is_refused(tree: object):
    (line,) = complaints(tree)
    assert line.startswith("config: (whole file): a config is a mapping")


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def test_overrides_replace_and_add_settings_as_yaml(tmp_path: Path):
    path = write(tmp_path, yaml.safe_dump(TREE))
    config = load_config(
        path,
        [
            "transform.resolution_px=512",
            "source.storage.endpoint_url=http://localhost:9000",
            "source.keep=[txt, json]",
            "transform.buckets={max_ratio: 2.0}",
            "output.url=s3://b/x=y",
            "name=again",
            "name=last one counts",
        ],
    )
    assert config.transform.resolution_px == 512
    assert config.source.storage.endpoint_url == "http://localhost:9000"
    assert config.source.keep == ["txt", "json"]
    assert config.output.url == "s3://b/x=y"
    assert config.name == "last one counts"
    assert config.source.shards == TREE["source"]["shards"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("transform.resolution_px", "write it as a.b=value"),
        ("=3", "write it as a.b=value"),
        ("transform..x=3", "write it as a.b=value"),
        ("name.first=x", "is not a path through sections"),
        ("source.keep=[txt", "not valid YAML"),
        ("transform.resolution=8", "transform.resolution: unknown setting"),
        ("compute.num_gpus=all", "compute.num_gpus: "),
    ],
)
def test_a_wrong_override_is_reported_in_one_line(tmp_path: Path, override: str, expected: str):
    path = write(tmp_path, yaml.safe_dump(TREE))
    with pytest.raises(ConfigError, match=r"^\S") as caught:
        load_config(path, [override])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "(whole file): a config is a mapping"),
        ("- a\n", "(whole file): a config is a mapping"),
        ("name: [", "is not valid YAML"),
        ("name: !!python/object/apply:os.getcwd []", "is not valid YAML"),
        ("name: a\n\tb: c", "is not valid YAML"),
    ],
)
def test_a_file_without_a_config_is_reported_in_one_line(tmp_path: Path, text: str, expected: str):
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text))
    assert expected in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "name: 2001-13-45",
        "name: 0x_",
        "? [a]\n: b",
        "? {a: b}\n: b",
        "name: !!timestamp x",
        "name: !!bool x",
        "name: !!int x",
        "name: !!binary é",
        "name: " + "9" * 5000,
        "[" * 5000 + "]" * 5000,
        "a: &a [*a]",
        "x: {<<: 3}",
        "name: a\0b",
        "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)),
        "a0: &a0 {k: v}\n"
        + "".join(f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 9)),
    ],
)
def test_hostile_or_malformed_yaml_is_reported_in_one_line(tmp_path: Path, text: str):
    for read in (load_config, load_eval_config):
        with pytest.raises(ConfigError, match="is not valid YAML: ") as caught:
            read(write(tmp_path, text))
        assert str(caught.value).isprintable()
    with pytest.raises(ConfigError, match="is not valid YAML: "):
        load_config(write(tmp_path, yaml.safe_dump(TREE)), [f"name={text}"])


def test_a_config_larger_than_a_megabyte_is_refused_in_bounded_memory(tmp_path: Path):
    with (tmp_path / "config.yaml").open("wb") as file:
        file.truncate(10**9)  # all holes: read whole, it would not fit the test's memory
    tracemalloc.start()
    with pytest.raises(ConfigError, match="larger than"):
        load_config(tmp_path / "config.yaml")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * 2**20


def test_yaml_anchors_are_accepted(tmp_path: Path):
    text = yaml.safe_dump(TREE) + "latents: {dtype: &d float16}\nqa: {seed: 3}\n"
    config = load_config(write(tmp_path, text + "compute: &c {num_gpus: 0}\n"))
    assert (config.latents.dtype, config.compute.num_gpus) == ("float16", 0)


FLOATS = [
    "transform.max_upscale",
    "rejects.max_rate",
    "compute.wait_for_gpus_s",
    "qa.fraction",
    "qa.min_psnr_db",
    "qa.min_drift_db",
]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1e999"])
@pytest.mark.parametrize("path", FLOATS)
def test_a_number_that_is_not_finite_is_refused(path: str, value: object):
    (line,) = complaints(with_setting(path, value))
    assert line.startswith(f"config: {path}: ")


def test_an_integer_of_more_than_64_bits_is_refused():
    for path in ("compute.num_gpus", "qa.seed", "transform.max_pixels"):
        (line,) = complaints(with_setting(path, 10**5000))
        assert line == f"config: {path}: is too large"


def test_file_name_extensions_are_accepted_with_or_without_a_dot():
    config = parse_config(with_setting("source.image", [".jpg", "PNG"]))
    assert config.source.image == ["jpg", "PNG"]
    for wrong in ("*.jpg", "", ".", "images/jpg"):
        (line,) = complaints(with_setting("source.image", [wrong]))
        assert line.startswith("config: source.image: ")


def test_an_unreadable_config_file_is_reported(tmp_path: Path):
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="directory"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(tmp_path / "latin.yaml")


def test_a_config_is_frozen():
    config = parse_config(TREE)
    with pytest.raises(ValueError, match="frozen"):
        config.name = "other"


def printed_schema(*options: str) -> dict[str, Any]:
    """What `latentcache schema` prints."""
    done = subprocess.run(
        [sys.executable, "-m", "latentcache.cli", "schema", *options],
        capture_output=True,
        text=True,
        check=True,
    )
    tree: dict[str, Any] = json.loads(done.stdout)
    jsonschema.Draft202012Validator.check_schema(tree)
    return tree


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return printed_schema()


def test_the_schema_of_an_evaluation_accepts_the_shipped_configs():
    schema = printed_schema("--eval")
    assert EVAL_CONFIGS
    for path in EVAL_CONFIGS:
        tree = yaml.safe_load(path.read_text())
        jsonschema.validate(tree, schema)
        assert load_eval_config(path).vae.checkpoint
        with pytest.raises(jsonschema.ValidationError, match="unexpected"):
            jsonschema.validate(tree | {"model": []}, schema)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_schema_accepts_the_shipped_configs(path: Path, schema: dict[str, Any]):
    jsonschema.validate(yaml.safe_load(path.read_text()), schema)


@pytest.mark.parametrize("path", TYPOS)
def test_the_schema_refuses_an_unknown_setting(path: str, schema: dict[str, Any]):
    with pytest.raises(jsonschema.ValidationError, match=r"unexpected|not valid under"):
        jsonschema.validate(with_setting(path, 1), schema)


def test_the_schema_describes_every_section(schema: dict[str, Any]):
    assert schema["properties"].keys() == Config.model_fields.keys()
    sections = {name.lower(): section for name, section in schema["$defs"].items()}
    assert all(section.get("description") for section in sections.values())


def test_a_duplicate_setting_is_refused_with_its_line(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text("name: a\nsource: {shards: x.tar}\nname: b\n")
    with pytest.raises(ConfigError, match=r"'name' is set twice.*line 3"):
        load_config(path)


def test_a_value_in_place_of_a_section_is_refused(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text("name: a\nsource: x.tar\n")
    with pytest.raises(ConfigError, match="source: must be a section with settings"):
        load_config(path)
