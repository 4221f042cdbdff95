"""The command line as a user meets it: exit codes, one JSON object, one line for each mistake."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

import latentcache
from latentcache import open_dataset, verify
from latentcache.dataset.contract import establish_contract
from latentcache.metrics import drift_db
from latentcache.storage import Store
from makers import config_tree, flip_byte, make_contract, png, tree_digest, write_tar
from runs import Cli, Result

pytestmark = pytest.mark.slow

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"

VERBS = (
    *("run", "plan", "status", "verify", "inspect", "eval", "bench-loader", "schema"),
    *("demo-data", "diff", "publish", "gc"),
)

# Rich would take these for markup, a terminal for a command.
CAPTION = "[red]a [/b] caption\x1b[2J with ü and\na line break"


@dataclass(frozen=True)
class Demo:
    """`configs/demo.yaml` over shards of `demo-data` and one of our own, at a small resolution."""

    cli: Cli
    folder: Path
    first: Result

    @property
    def url(self) -> str:
        return str(self.folder / "out")

    def args(self, verb: str, *more: str) -> list[str]:
        overrides = [
            f"source.shards={self.folder}/shards/*.tar",
            f"output.url={self.folder}/out",
            "transform.resolution_px=64",
            "transform.buckets={max_ratio: 2.0, step_px: 32}",
            "rejects.max_rate=0.5",
        ]
        return [verb, str(DEMO), *(part for o in overrides for part in ("--set", o)), *more]

    def __call__(self, verb: str, *more: str) -> Result:
        return self.cli(*self.args(verb, *more))

    def moved_to(self, folder: Path) -> Demo:
        """A copy of its output to damage; the shards stay where they are, as links."""
        shutil.copytree(self.folder / "out", folder / "out")
        (folder / "shards").symlink_to(self.folder / "shards")
        return Demo(self.cli, folder, self.first)

    def objects(self, pattern: str) -> list[Path]:
        return sorted((self.folder / "out").glob(pattern))


@pytest.fixture(scope="module")
def demo(cli: Cli, local_cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """Made by a run that starts a Ray of its own, whose processes write to stdout too."""
    folder = tmp_path_factory.mktemp("demo")
    drawn = cli.ok("demo-data", folder / "shards", "--shards", "3", "--samples", "5")
    assert (drawn["num_shards"], drawn["num_samples"], drawn["num_broken"]) == (3, 15, 3)
    write_tar(
        folder / "shards" / "own.tar",
        [("a.png", png(80, 80)), ("a.txt", CAPTION.encode()), ("b.png", png(80, 80, 1))],
    )
    unfinished = Demo(local_cli, folder, Result(-1, "", ""))
    return Demo(cli, folder, unfinished("run", "--json"))


def assert_one_complaint(result: Result, code: int, expected: str) -> None:
    assert result.code == code, result
    (line,) = result.stderr.splitlines()
    assert line.startswith("latentcache: error: ")
    assert expected in line


# Help.


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_has_help(cli: Cli, verb: str):
    result = cli(verb, "--help")
    assert result.code == 0
    assert f"latentcache {verb}" in result.stdout
    assert cli(verb, "-h").stdout == result.stdout


def test_help_lists_every_command_and_version_prints_the_version(cli: Cli):
    result = cli("--help")
    assert result.code == 0
    assert all(verb in result.stdout for verb in VERBS)
    assert cli("--version").stdout.strip() == latentcache.__version__


@pytest.mark.parametrize(
    "args",
    [["encode"], ["run"], ["run", "a.yaml", "--sett", "a=b"], ["inspect", "x", "--rows", "-1"]],
)
def test_wrong_usage_exits_with_2(cli: Cli, args: list[str]):
    result = cli(*args)
    assert result.code == 2
    assert result.stdout == ""
    assert "Usage" in result.stderr


# Mistakes.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A valid config `c.yaml`, and a source of one shard."""
    write_tar(tmp_path / "src" / "0.tar", [("a.png", png(64, 64))])
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config_tree(tmp_path)))
    return tmp_path


@pytest.mark.parametrize("verb", ["run", "plan", "status", "verify", "inspect"])
def test_a_wrong_config_prints_one_line_and_exits_with_2(cli: Cli, folder: Path, verb: str):
    result = cli(verb, folder / "c.yaml", "--set", "transform.resolution=64")
    assert_one_complaint(result, 2, "transform.resolution: unknown setting; did you mean")
    assert result.stdout == ""


def test_a_missing_config_file_prints_one_line_and_exits_with_2(cli: Cli, folder: Path):
    assert_one_complaint(cli("plan", folder / "none.yaml"), 2, "none.yaml: No such file")


MISTAKES = [
    ("source.shards=pipe:cat x.tar", 2, "source.shards"),
    ("source.shards=FOLDER/src/*.gz", 1, "*.gz"),
    ("source.shards=FOLDER/src/{0..3}.tar", 1, "1.tar"),
    ("source.shards=nosuch://bucket/x.tar", 2, "nosuch"),
    ("vae.checkpoint=FOLDER/nowhere", 2, "nowhere"),
    ("vae.checkpoint=FOLDER/c.yaml", 2, "c.yaml"),
    ("transform.buckets={max_ratio: 2.0, step_px: 48}", 2, "step_px 48"),
]


@pytest.mark.parametrize(("override", "code", "expected"), MISTAKES)
def test_run_reports_a_wrong_input_in_one_line_and_creates_no_output(
    cli: Cli, folder: Path, override: str, code: int, expected: str
):
    override = override.replace("FOLDER", str(folder))
    result = cli("run", folder / "c.yaml", "--set", override)
    assert_one_complaint(result, code, expected)
    assert not (folder / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpus_are_reported_at_once(ray_cli: Cli, local_cli: Cli, folder: Path):
    missing = local_cli("run", folder / "c.yaml", "--set", "compute.num_gpus=2")
    assert_one_complaint(missing, 1, "Ray found no GPU: set compute.wait_for")
    # The tests' cluster claims to have one, as a node with a CPU build of torch would.
    unusable = ray_cli("run", folder / "c.yaml", "--set", "compute.num_gpus=1")
    assert_one_complaint(unusable, 1, "cannot use it: install a CUDA build")
    known = ("--set", "compute.num_gpus=1", "--set", "compute.precision=fp32")
    assert_one_complaint(ray_cli("run", folder / "c.yaml", *known), 1, "cannot use it")
    # A run that never got going leaves its contract, which must not be a trap.
    refused = ray_cli("run", folder / "c.yaml", *known, "--set", "transform.resolution_px=128")
    assert refused.code == 2
    assert "to start over, as nothing is committed yet" in refused.stderr


def test_json_option_prints_an_error_as_a_json_object(cli: Cli, folder: Path):
    result = cli("run", folder / "c.yaml", "--set", "vae.checkpoint=nowhere", "--json")
    assert result.json.keys() == {"status", "error", "exit_code"}
    assert (result.json["status"], result.json["exit_code"]) == ("error", 2)
    assert result.code == 2


def test_log_json_option_logs_an_error_as_a_json_object(cli: Cli, folder: Path):
    result = cli("run", folder / "c.yaml", "--set", "vae.checkpoint=nowhere", "--log-json")
    assert (result.code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    error = json.loads(line)
    assert error.keys() == {"time", "level", "event", "message", "exit_code"}
    assert (error["level"], error["event"], error["exit_code"]) == ("error", "error", 2)
    assert "nowhere" in error["message"]


@pytest.mark.parametrize(
    "verb", ["status", "verify", "inspect", "bench-loader", "diff", "publish", "gc"]
)
def test_commands_report_a_url_that_is_not_a_dataset(cli: Cli, folder: Path, verb: str):
    assert_one_complaint(cli(verb, folder / "src"), 1, "is not a latent dataset")


def test_set_option_requires_a_config(cli: Cli, folder: Path):
    expected = "--set needs a config"
    assert_one_complaint(cli("status", folder / "src", "--set", "name=x"), 2, expected)


# What is made.


def test_run_json_has_the_counts_of_the_dataset(demo: Demo):
    made = demo.first.json
    assert demo.first.code == 0, demo.first.stderr
    assert made.keys() >= {
        *("status", "num_units", "num_committed", "num_skipped", "num_rows", "num_rejects"),
        *("manifest", "elapsed_s", "exit_code"),
    }
    assert made["status"] == "complete"
    assert (made["num_units"], made["num_committed"], made["num_skipped"]) == (4, 4, 0)
    assert (made["manifest"], made["exit_code"], made["failed"]) == (1, 0, [])
    assert made["num_rows"] + made["num_rejects"] == 15 + 2
    assert made["num_rejects"] == 3
    dataset = open_dataset(demo.url)
    assert len(dataset) == made["num_rows"]
    assert all(row.latent.isfinite().all() for row in dataset)


def test_a_second_run_encodes_and_writes_nothing(demo: Demo):
    before = tree_digest(demo.folder)
    result = demo("run", "--json")
    assert result.code == 0
    again = result.json
    assert (again["num_committed"], again["num_skipped"], again["manifest"]) == (0, 4, 1)
    assert again["bottleneck"] is None
    assert again["num_rows"] == demo.first.json["num_rows"]
    assert tree_digest(demo.folder) == before


def test_plan_lists_pending_units_with_reasons_and_writes_nothing(demo: Demo, tmp_path: Path):
    nothing = demo("plan", "--json").json
    assert nothing.keys() >= {"num_units", "num_pending", "pending", "contract_diff"}
    assert (nothing["num_units"], nothing["num_pending"], nothing["pending"]) == (4, 0, [])
    assert nothing["contract_diff"] == []

    again = demo("plan", "--retry-rejects", "--json").json
    assert again["num_pending"] == 3
    assert {p["reason"] for p in again["pending"]} == {"retry of 1 rejects"}
    assert all(p.keys() == {"unit", "source", "range", "reason", "kind"} for p in again["pending"])

    text = demo("plan", "--set", f"output.url={tmp_path}/new").stdout
    assert [line.split()[-1] for line in text.splitlines()[:4]] == ["new"] * 4
    assert "own.tar" in text
    assert "4 of 4 units to encode" in text
    assert not (tmp_path / "new").exists()


def test_run_and_plan_refuse_another_contract_with_its_diff(demo: Demo):
    before = tree_digest(demo.folder)
    other = ("--set", "latents.dtype=float32", "--set", "transform.dct_scaling=true")
    planned = demo("plan", *other, "--json")
    assert planned.code == 2
    assert planned.json["contract_diff"] == [
        'latents.dtype: dataset has "float16", config has "float32"',
        "transform.dct_scaling: dataset has false, config has true",
    ]
    assert {unit["reason"] for unit in planned.json["pending"]} == {"another contract"}
    refused = demo("run", *other)
    assert refused.code == 2
    assert "latents.dtype" in refused.stderr
    assert "output.url" in refused.stderr
    assert tree_digest(demo.folder) == before


def test_status_counts_match_the_run(demo: Demo):
    status = demo.cli.ok("status", demo.url)
    assert status.keys() >= {"num_units", "num_committed", "num_rows", "num_rejects", "manifests"}
    assert (status["num_units"], status["num_committed"]) == (4, 4)
    assert (status["manifests"], status["complete"]) == ([1], True)
    assert status["num_rows"] == demo.first.json["num_rows"]
    assert status["num_rejects"] == demo.first.json["num_rejects"]
    assert status["failed"] == {}
    assert status["active_runs"] == []
    # All receipts are of the one run, and say the same afterwards.
    assert status["bottleneck"] == demo.first.json["bottleneck"]
    assert "4 of 4 known units committed" in demo("status").stdout, "by its config"


def test_status_watch_ends_at_once_on_a_complete_dataset(demo: Demo):
    watched = demo.cli.ok("status", demo.url, "--watch")
    assert watched["rows_per_s"] is watched["left_s"] is None
    del watched["window_s"], watched["rows_per_s"], watched["left_s"]
    assert watched == demo.cli.ok("status", demo.url)
    (line,) = demo("status", "--watch").stdout.splitlines()
    assert line.startswith(f"4/4 units, {demo.first.json['num_rows']} rows, 3 rejects, 0 failed")


def test_ctrl_c_ends_status_watch_with_exit_code_0(cli: Cli, tmp_path: Path):
    establish_contract(Store(str(tmp_path)), make_contract(), {})
    watching = cli.start("status", tmp_path, "--watch", "--every", "0.1")
    watching.wait_until_it_prints("0/0 units, 0 rows, 0.0 rows/s")  # the second time, at least
    watching.process.send_signal(signal.SIGINT)
    result = watching.result()
    assert (result.code, result.stderr) == (0, "")


def test_inspect_json_matches_the_dataset(demo: Demo):
    shown = demo.cli.ok("inspect", demo.url, "--rows", "100")
    dataset = open_dataset(demo.url)
    assert shown["num_rows"] == len(dataset) == len(shown["rows"])
    assert shown["num_rejects"] == 3
    assert sum(shown["rejects_by_reason"].values()) == 3
    assert sum(shown["buckets"].values()) == len(dataset)
    assert shown["contract"] == dataset.contract.to_json()
    assert [c["mean"] for c in shown["channels"]] == dataset.stats.mean.tolist()
    assert [c["std"] for c in shown["channels"]] == dataset.stats.std.tolist()
    (own,) = (row for row in shown["rows"] if row["key"] == "a")
    assert own["caption"] == CAPTION
    assert own["original_size"] == [80, 80]


def test_bench_loader_measures_a_dataset_smaller_than_a_batch(demo: Demo):
    shown = demo("bench-loader", "--seconds", "0.2", "--dtype", "bfloat16")
    assert shown.code == 0, shown.stderr
    assert "samples/s" in shown.stdout
    measured = demo.cli.ok("bench-loader", demo.url, "--seconds", "0.2", "--batch-size", "4")
    assert measured["num_rows"] == measured["num_steps"] * 4 > 0
    sizes = [4 * row.latent.numel() for row in open_dataset(demo.url)]
    bytes_per_row = measured["megabytes_per_s"] * 1e6 / measured["rows_per_s"]
    assert min(sizes) <= round(bytes_per_row) <= max(sizes)
    assert 0 < measured["step_p50_ms"] <= measured["step_p99_ms"]
    assert min(measured[f"{what}_s"] for what in ("open", "first_batch", "resume")) > 0


def test_bench_loader_refuses_wrong_dtype_column_and_cache_size(demo: Demo):
    assert_one_complaint(demo("bench-loader", "--dtype", "int8"), 2, "--dtype is 'int8'")
    assert_one_complaint(demo("bench-loader", "--column", "nope"), 2, "no column 'nope'")
    assert_one_complaint(demo("bench-loader", "--cache-bytes", "much"), 2, "is not a size")


def test_inspect_prints_captions_without_markup_or_terminal_escapes(demo: Demo):
    result = demo("inspect", "--rows", "100")
    assert result.code == 0
    text = result.stdout
    assert "[red]a" in text
    assert "[/b]" in text
    assert "\x1b" not in text, "a caption may not command the terminal"
    assert "64x64" in text


def test_verify_of_an_undamaged_dataset_is_ok_and_writes_nothing(demo: Demo):
    before = tree_digest(demo.folder)
    actual = demo.cli.ok("verify", demo.url)
    assert actual.keys() >= {"ok", "num_files", "num_rows", "num_rejects", "problems"}
    assert actual["ok"]
    assert actual["problems"] == []
    files = [name for kind in ("data", "rejects", "qa") for name in demo.objects(f"{kind}/*/*")]
    assert actual["num_files"] == len(files)
    assert actual["num_rows"] == demo.first.json["num_rows"]
    assert actual["num_rejects"] == demo.first.json["num_rejects"]
    assert demo("verify", "--quick").stdout.startswith("ok: manifest 1, 4 units")
    assert tree_digest(demo.folder) == before


def test_gc_lists_unreferenced_files_and_deletes_them_with_delete_option(
    demo: Demo, tmp_path: Path
):
    copy = demo.moved_to(tmp_path)
    unreferenced = Path(copy.url) / "data" / f"{'a' * 32}" / f"0-{'b' * 32}-64x64.parquet"
    unreferenced.parent.mkdir()
    unreferenced.write_bytes(b"some")
    os.utime(unreferenced, (time.time() - 8 * 86400,) * 2)
    result = copy.cli("gc", copy.url)
    assert result.code == 0, result.stderr
    assert "1  " in result.stdout.splitlines()[0]
    assert result.stdout.splitlines()[-1].startswith(
        "would delete 1 objects, 4 B; kept manifests: 1"
    )
    assert "--delete removes them" in result.stdout
    assert unreferenced.exists()
    refused = copy.cli("gc", copy.url, "--delete", "--older-than-days", "1.5")
    assert refused.code == 2
    assert "at least 2" in refused.stderr
    deleted = copy.cli.ok("gc", copy.url, "--delete")
    assert (deleted["is_deleted"], deleted["num_objects"], deleted["kept"]) == (True, 1, [1])
    assert [each["size_bytes"] for each in deleted["objects"]["files"]] == [4]
    assert not unreferenced.exists()
    assert verify(copy.url).ok


def test_verify_repair_removes_damaged_units_and_run_encodes_them_again(demo: Demo, tmp_path: Path):
    copy = demo.moved_to(tmp_path)
    undamaged = {row.key: row.latent for row in open_dataset(copy.url)}
    flipped, deleted = copy.objects("data/*/*")[:2]
    flip_byte(flipped)

    # Same size: a quick look cannot see it, a whole one names it.
    assert copy.cli.ok("verify", copy.url, "--quick")["ok"]
    result = copy.cli("verify", copy.url, "--json")
    assert result.code == 3
    (problem,) = result.json["problems"]
    assert problem["path"] == flipped.relative_to(copy.url).as_posix()
    assert "SHA-256" in problem["message"]
    assert "--repair" in result.stderr

    deleted.unlink()
    result = copy.cli("verify", copy.url, "--quick")
    assert result.code == 3
    assert f"{deleted.relative_to(copy.url).as_posix()}: is gone" in result.stdout

    result = copy.cli("verify", copy.url, "--repair", "--json")
    assert result.code == 3
    bad = {flipped.parent.name, deleted.parent.name}
    assert set(result.json["repaired"]) == bad
    assert "run `latentcache run` to encode them again" in result.stderr

    planned = copy.cli(*planned_args(copy)).json
    assert {p["unit"] for p in planned["pending"]} == bad
    assert {p["reason"] for p in planned["pending"]} == {"removed before: encoded again"}
    mended = copy.cli(*planned_args(copy, "run")).json
    assert (mended["num_committed"], mended["num_skipped"]) == (len(bad), 4 - len(bad))
    assert mended["manifest"] == 3
    assert verify(copy.url).ok
    again = {row.key: row.latent for row in open_dataset(copy.url)}
    assert again.keys() == undamaged.keys()
    # Another number of threads adds up in another order.
    for key, latent in again.items():
        assert drift_db(latent[None], undamaged[key][None]) > 50


def planned_args(copy: Demo, verb: str = "plan") -> list[str]:
    """Its shards by the URLs that the units are named after."""
    shards = (copy.folder / "shards").resolve()
    return copy.args(verb, "--set", f"source.shards={shards}/*.tar", "--json")


def test_demo_data_prints_its_counts(cli: Cli, tmp_path: Path):
    said = cli("demo-data", tmp_path, "--shards", "1", "--samples", "2", "--no-broken").stdout
    assert said == f"2 samples, 0 of them damaged, in {tmp_path}\n"


# The reject budget.


def test_too_many_rejects_fail_the_run_and_a_higher_max_rate_accepts_them(cli: Cli, tmp_path: Path):
    """Two shards of 505 samples, of which five are pictures."""
    for shard in range(2):
        members = [(f"{index:04d}.jpg", b"text") for index in range(500)]
        members += [(f"good{index}.png", png(64, 64, index)) for index in range(5)]
        write_tar(tmp_path / "src" / f"{shard}.tar", members)
    config, url = tmp_path / "c.yaml", str(tmp_path / "out")
    config.write_text(
        yaml.safe_dump(config_tree(tmp_path, source={"keep": []}, rejects={"max_rate": 0.02}))
    )
    one = ("--set", f"source.shards={tmp_path}/src/0.tar")

    # A run of fewer than a thousand samples goes on to its end, and is judged there.
    small = cli("run", config, *one, "--json")
    assert small.code == 3
    assert (small.json["status"], small.json["num_rejects"]) == ("too_many_rejects", 500)
    reason = small.json["reject_reasons"][0]
    assert (reason["reason"], reason["num_rejects"], reason["key"]) == (
        "decode/not_an_image",
        500,
        "0000",
    )
    assert "500 of 505 samples" in small.stderr
    first = cli("run", config, *one, "--set", "rejects.max_rate=1", "--json")
    assert first.code == 0
    assert (first.json["status"], first.json["num_rejects"]) == ("complete", 500)

    second = cli("run", config, "--json")
    assert second.code == 3
    made = second.json
    assert (made["status"], made["exit_code"]) == ("too_many_rejects", 3)
    assert (made["num_committed"], made["num_rows"], made["num_rejects"]) == (1, 10, 1000)
    assert "99.0% of 1010 samples were rejected" in second.stderr
    assert "rejects.max_rate" in second.stderr
    assert not open_dataset(url, made["manifest"]).manifest.complete
    assert len(open_dataset(url)) == 5, "the newest complete manifest is that of the first run"
    assert not cli.ok("status", url)["complete"]

    # The same command again finds the same, and encodes nothing.
    again = cli("run", config, "--json")
    assert (again.code, again.json["num_committed"]) == (3, 0)
    assert again.json["manifest"] == made["manifest"]

    # Who accepts the rate gets the dataset, without encoding anything again.
    accepted = cli("run", config, "--set", "rejects.max_rate=1", "--json")
    assert accepted.code == 0
    assert (accepted.json["num_committed"], accepted.json["num_rows"]) == (0, 10)
    assert len(open_dataset(url)) == 10


def test_an_unwritable_folder_prints_one_line_and_exits_with_1(cli: Cli):
    result = cli.start("demo-data", "/proc/nowhere").result()
    assert result.code == 1
    assert result.stderr.splitlines() == [
        "latentcache: error: /proc/nowhere: No such file or directory"
    ]
