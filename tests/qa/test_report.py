"""The QA report: its figures, its pictures, what it makes of bad input, and that it stays small."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import browser
from browser import Browser
from latentcache import Dataset, open_dataset
from latentcache.dataset.bucket import Bucket
from latentcache.dataset.contract import Contract
from latentcache.dataset.receipts import Receipt
from latentcache.dataset.shards import RejectRow
from latentcache.errors import ConfigError, DatasetError, LatentCacheError, StorageError
from latentcache.qa import figures, report
from latentcache.qa.gates import Gates
from latentcache.qa.html import RowPictures, draw_row
from latentcache.qa.qa_files import QaRow
from latentcache.qa.report import build_report, report_path
from makers import (
    draw,
    encode_image,
    flip_byte,
    make_contract,
    make_latents,
    make_qa_rows,
    write_dataset,
)

SQUARE, WIDE = (64, 64), (96, 48)
GATES = Gates(min_psnr_db=15.0, min_drift_db=30.0)
NASTY = """<script>document.title = "owned"</script>"><img src="https://example.com/x.png"> 'ü"""


@dataclass
class Read(HTMLParser):
    """What a page says: its text by the id of the innermost element that has one."""

    html: str
    text: dict[str, str] = field(default_factory=dict)
    images: list[dict[str, str]] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._ids: list[str] = [""]
        self.feed(self.html)
        assert self._ids == [""], "an element is not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        known = {name: value or "" for name, value in attrs}
        if tag == "img":
            self.images.append(known)
        if tag not in ("img", "meta", "input", "rect", "line"):
            self._ids.append(known.get("id", self._ids[-1]))

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("rect", "line"):
            self._ids.pop()

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text[self._ids[-1]] = self.text.get(self._ids[-1], "") + data

    @property
    def all_text(self) -> str:
        return "".join(self.text.values())

    @property
    def cards(self) -> list[str]:
        """The text of each row that is shown, in order."""
        return [text for name, text in self.text.items() if name.startswith("row-")]


def make(
    folder: Path,
    qa: dict[str, Sequence[QaRow]],
    contract: Contract | None = None,
    rejects: Sequence[RejectRow] = (),
) -> Dataset:
    """A dataset of a few rows and any QA rows; the rejects are of its first source."""
    contract = contract or make_contract(buckets=(SQUARE, WIDE))
    sources = {
        source: {bucket: make_latents(contract, bucket, 8, seed) for bucket in (SQUARE, WIDE)}
        for seed, source in enumerate(qa)
    }
    first = next(iter(qa))
    provenance = {"name": "photos", "checkpoint": "hf://stabilityai/sd-vae-ft-mse"}
    write_dataset(folder, contract, sources, {first: rejects}, qa, provenance)
    return open_dataset(str(folder / "out"))


def measured(rows: Sequence[QaRow], **changes: float) -> list[QaRow]:
    """The same rows, but some measures."""
    return [replace(row, **changes) for row in rows]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Two units of 20 QA rows each, one bucket each; the wide ones are worse."""
    contract = make_contract(buckets=(SQUARE, WIDE))
    qa = {
        "s3://in/a.tar": make_qa_rows(contract, SQUARE, 20),
        "s3://in/b.tar": make_qa_rows(contract, WIDE, 20, first=20),
    }
    rejects = [
        RejectRow("bad1", "decode", "truncated_image", "ends early"),
        RejectRow("bad2", "decode", "truncated_image", "ends early"),
        RejectRow(None, "read", "truncated_shard", "ends early"),
    ]
    return make(tmp_path_factory.mktemp("report"), qa, contract, rejects)


@pytest.fixture(scope="module")
def psnrs(dataset: Dataset) -> dict[str, float]:
    """The PSNR of each QA row, by key, from the pictures themselves."""
    actual = {}
    for record in dataset.units:
        assert record.qa
        for row in pq.read_table(
            f"{dataset.url.removeprefix('file://')}/{record.qa.file.path}"
        ).to_pylist():
            pictures = (Image.open(io.BytesIO(row[n])) for n in ("image", "reconstruction"))
            image, reconstruction = (np.asarray(p).astype(float) for p in pictures)
            actual[row["key"]] = 10 * math.log10(255**2 / ((image - reconstruction) ** 2).mean())
    return actual


# The figures.


def test_figures_match_the_qa_rows(dataset: Dataset, psnrs: dict[str, float]):
    tree = build_report(dataset, [], GATES).tree
    values = np.array(list(psnrs.values()))
    actual = tree["measures"]["psnr_db"]
    assert (actual["count"], tree["totals"]["num_qa_rows"]) == (40, 40)
    for name in ("mean", "std", "min", "max"):
        assert actual[name] == pytest.approx(getattr(values, name)())
    assert sum(actual["histogram"]["counts"]) == 40
    assert tree["totals"]["mean_psnr_db"] == pytest.approx(values.mean())
    square, wide = tree["buckets"]
    assert (wide["bucket"], wide["num_rows"], wide["num_qa_rows"]) == (Bucket(*WIDE).name, 16, 20)
    assert square["mean_psnr_db"] == pytest.approx(np.mean([psnrs[f"k{i:04d}"] for i in range(20)]))
    assert tree["verdict"]["status"] == "passed"
    assert not {"lpips", "psnr_cost_db"} & tree["measures"].keys()


def test_lpips_and_int8_cost_are_shown_for_rows_that_have_them(tmp_path: Path):
    contract = make_contract(buckets=(SQUARE, WIDE))
    rows = make_qa_rows(contract, SQUARE, 4)
    qa = {"a.tar": [*measured(rows[:3], lpips=0.25, psnr_cost_db=0.125), rows[3]]}
    made = build_report(make(tmp_path, qa, contract), [], GATES)
    assert made.tree["measures"]["lpips"]["mean"] == 0.25
    assert made.tree["measures"]["lpips"]["count"] == 3
    assert made.tree["measures"]["psnr_cost_db"]["max"] == 0.125
    page = Read(made.to_html())
    assert sum("LPIPS" in card for card in page.cards) == 3


def test_histogram_range_ignores_an_outlier():
    values = np.concatenate([np.linspace(20, 30, 1000), [-100.0]])
    actual = figures.distributions(pa.table(dict.fromkeys(figures.MEASURES, values)))["psnr_db"]
    assert actual["min"] == -100
    assert actual["histogram"]["edges"][0] > 0
    assert sum(actual["histogram"]["counts"]) == 1001


def test_worst_rows_and_seeded_draw_are_shown_once_each(dataset: Dataset, psnrs: dict[str, float]):
    rows = build_report(dataset, [], GATES, num_shown=8).tree["rows"]
    by_psnr = sorted(psnrs, key=lambda key: psnrs[key])
    assert [row["key"] for row in rows if "worst" in row["shown_as"]] == by_psnr[:4]
    assert len([row for row in rows if "draw" in row["shown_as"]]) == 8
    assert len({row["key"] for row in rows}) == len(rows)
    assert {row["source"] for row in rows} == {"s3://in/a.tar", "s3://in/b.tar"}
    drawn = [build_report(dataset, [], GATES, num_shown=8, seed=s).tree["rows"] for s in (0, 1)]
    assert drawn[0] == rows != drawn[1]


def test_rows_below_the_drift_gate_are_shown(tmp_path: Path):
    contract = make_contract(buckets=(SQUARE, WIDE))
    rows = make_qa_rows(contract, SQUARE, 30)
    rows[3:4] = measured(rows[3:4], drift_db=12.0)
    made = make(tmp_path, {"a.tar": rows}, contract)
    shown = build_report(made, ["a gate"], GATES, num_shown=2).tree["rows"]
    assert [row["key"] for row in shown if "drift" in row["shown_as"]] == ["k0003"]
    assert not any("drift" in r["shown_as"] for r in build_report(made, [], Gates()).tree["rows"])


@pytest.mark.parametrize("posterior", ["mean", "moments"])
def test_scaling_factor_is_compared_with_one_over_std(tmp_path: Path, posterior: str):
    contract = make_contract(buckets=(SQUARE, WIDE), posterior=posterior)
    made = make(tmp_path, {"a.tar": make_qa_rows(contract, SQUARE, 2)}, contract)
    latents = report_of(made)["latents"]
    values = torch.cat([row.latent[:4].double().flatten() for row in made])
    scaling = latents["scaling"]
    assert scaling["stored_std"] == pytest.approx(float(values.std(correction=0)))
    assert scaling["wanted"] == pytest.approx(1 / float(values.std(correction=0)))
    assert scaling["given_std"] == pytest.approx(0.18215 * float(values.std(correction=0)))
    assert scaling["is_off"]  # 1 / 3 is not 0.18215
    assert len(latents["channels"]) == contract.stored_channels
    assert sum(latents["channels"][0]["histogram"]["counts"]) == made.stats.count


def report_of(dataset: Dataset) -> dict[str, Any]:
    return build_report(dataset, [], GATES).tree


@pytest.mark.parametrize(
    ("change", "is_off"),
    [
        ({"scaling_factor": 1 / 3}, False),
        ({"scaling_factor": 1 / 3.5}, False),
        ({"scaling_factor": 1 / 4}, True),
        ({"scaling_factor": 1 / 3, "shift_factor": 100.0}, False),
        ({"scaling_factor": 1.0, "latents_mean": (0.0,) * 4, "latents_std": (3.0,) * 4}, False),
        ({"scaling_factor": 0.5, "latents_mean": (0.0,) * 4, "latents_std": (3.0,) * 4}, True),
    ],
)
def test_scaling_check_uses_shift_and_statistics_by_channel(
    tmp_path: Path, change: dict[str, Any], is_off: bool
):
    plain = make_contract(buckets=(SQUARE, WIDE))
    contract = replace(plain, vae=replace(plain.vae, **change))
    made = make(tmp_path, {"a.tar": make_qa_rows(contract, SQUARE, 2)}, contract)
    assert report_of(made)["latents"]["scaling"]["is_off"] is is_off
    page = Read(build_report(made, [], GATES).to_html())
    assert ("more than 20 % off" in page.all_text) is is_off


def test_throughput_is_read_from_evenly_spaced_receipts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    contract = make_contract(buckets=(SQUARE, WIDE))
    made = make(tmp_path, {f"{i}.tar": [] for i in range(10)} | {"0.tar": []}, contract)
    for number, record in enumerate(made.units):
        path = tmp_path / "out" / "commits" / f"{record.name}.json"
        receipt = Receipt.from_bytes(path.read_bytes())
        stages = {
            "zip": {"busy_s": 1.0, "wait_s": 0.0, "num_threads": 1},
            "encode": {"busy_s": 2.0**number, "wait_s": 0.5, "num_threads": 1},
            "decode": {"busy_s": 7 * 2.0**number, "wait_s": 0.5, "num_threads": 4},
            "fetch": {"busy_s": 1.0, "wait_s": 0.0, "num_threads": 2},
        }
        path.write_bytes(replace(receipt, stages=stages).to_bytes())
    monkeypatch.setattr(figures, "_MAX_RECEIPTS", 5)
    actual = report_of(made)["throughput"]
    assert (actual["num_units"], actual["num_receipts"], actual["num_samples"]) == (10, 5, 5 * 16)
    assert [stage["stage"] for stage in actual["stages"]] == ["fetch", "decode", "encode", "zip"]
    assert actual["stages"][2]["busy_s"] == sum(2.0**number for number in (0, 2, 4, 6, 8))
    assert actual["stages"][2]["wait_s"] == 2.5
    assert [stage["num_threads"] for stage in actual["stages"]] == [2, 4, 1, 1]
    bound = "decoding; add 3 threads to each actor (compute.decode_threads: 7)"
    assert actual["bottleneck"] == f"bottleneck: {bound}"
    text = Read(build_report(made, [], GATES).to_html()).text["throughput"]
    assert "5 units spread evenly over 10" in text
    assert f"{5 * 16 / 5:.0f} samples/s" in text
    assert bound in text


def test_rejects_are_counted_by_reason(dataset: Dataset):
    actual = report_of(dataset)["rejects"]
    assert [(r["stage"], r["reason"], r["num_rejects"]) for r in actual] == [
        ("decode", "truncated_image", 2),
        ("read", "truncated_shard", 1),
    ]
    assert [example["key"] for example in actual[0]["examples"]] == ["bad1", "bad2"]
    text = Read(build_report(dataset, [], GATES).to_html()).text["rejects"]
    assert "no picture" in text
    assert "3 of 35 samples" in text


# The pictures.


def test_pictures_show_the_row_its_error_and_its_latent():
    contract = make_contract()
    (row,) = make_qa_rows(contract, SQUARE, 1)
    black = np.zeros((64, 64, 3), np.uint8)
    white = black.copy()
    white[:32] = 255
    latent = np.zeros((4, 8, 8), "<f4")
    latent[0, 0], latent[0, 7] = -99, 99
    row = replace(
        row,
        image=encode_image(Image.fromarray(white)),
        reconstruction=encode_image(Image.fromarray(black)),
        latent=latent.tobytes(),
    )
    drawn = draw_row(row, [0.0] * 4, [1.0] * 4)
    error = pixels_of(drawn.error)
    assert error[8].mean() > 200  # all wrong: the brightest colour
    assert error[56].mean() < 30
    first, second = (pixels_of(uri).astype(int) for uri in drawn.channels[:2])
    assert first.shape == (8, 8, 3)
    assert (first[0, :, 2] > first[0, :, 0]).all()  # low is blue
    assert (first[7, :, 0] > first[7, :, 2]).all()  # high is red
    assert (np.ptp(second, axis=(0, 1)) == 0).all()  # a channel of zeros has one colour
    assert len(drawn.channels) == 4
    assert abs(pixels_of(drawn.original).astype(int) - white).max() < 40


def pixels_of(uri: str) -> np.ndarray[Any, Any]:
    data = base64.b64decode(uri.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_large_pictures_are_scaled_down():
    contract = make_contract(buckets=((1024, 512),))
    (row,) = make_qa_rows(contract, (1024, 512), 1)
    drawn = draw_row(row, [0.0] * 4, [1.0] * 4)
    assert (drawn.width_px, drawn.height_px) == (1024, 512)
    assert pixels_of(drawn.original).shape == pixels_of(drawn.error).shape == (256, 512, 3)


def test_latent_with_nan_and_inf_has_pictures():
    (row,) = make_qa_rows(make_contract(), SQUARE, 1)
    latent = np.full((4, 8, 8), np.nan, "<f4")
    latent[1:] = np.inf
    drawn = draw_row(replace(row, latent=latent.tobytes()), [0.0] * 4, [0.0] * 4)
    assert pixels_of(drawn.channels[0]).shape == (8, 8, 3)


def test_examples_of_rejects_with_thumbnail_come_first(tmp_path: Path):
    contract = make_contract(buckets=(SQUARE, WIDE))
    rejects = [RejectRow(f"bad{i}", "transform", "too_small", "9 px") for i in range(20)]
    made = make(tmp_path, {"a.tar": []}, contract, rejects)
    (path,) = (tmp_path / "out" / "rejects").rglob("*.parquet")
    table = pq.read_table(path)
    thumbnails = [None] * 19 + [encode_image(draw(9, 9), "jpeg")]
    if "thumbnail" in table.column_names:
        table = table.drop_columns("thumbnail")
    pq.write_table(table.append_column("thumbnail", pa.array(thumbnails, pa.binary())), path)
    done = build_report(made, [], GATES)
    (reason,) = done.tree["rejects"]
    assert reason["num_rejects"] == 20
    keys = [example["key"] for example in reason["examples"]]
    assert keys == ["bad19", "bad0", "bad1", "bad2", "bad3", "bad4"]
    (image,) = Read(done.to_html()).images
    assert pixels_of(image["src"]).shape == (9, 9, 3)
    assert "bad19" in image["alt"]


# The page.


def test_page_has_the_figures_of_the_json(dataset: Dataset, tmp_path: Path):
    done = build_report(dataset, ["a gate was not passed"], GATES, notes=["from the kept crops"])
    page = Read(done.to_html())
    done.save(tmp_path / "report.json")
    tree = json.loads((tmp_path / "report.json").read_bytes())
    assert json.loads(page.text["json"]) == tree == done.tree
    said = page.all_text.removesuffix(page.text["json"])
    for name, digits in (("psnr_db", 2), ("ssim", 4), ("drift_db", 1)):
        for figure in ("mean", "std", "min", "max"):
            assert f"{tree['measures'][name][figure]:.{digits}f}" in said
    for row, card in zip(tree["rows"], page.cards, strict=True):
        assert row["key"] in card
        assert f"{row['psnr_db']:.2f} dB" in card
        assert row["source"] in card
    for text in ("a gate was not passed", "from the kept crops", tree["fingerprint"], "Failed"):
        assert text in said
    assert "hf://stabilityai/sd-vae-ft-mse" in said
    assert all(image["src"].startswith("data:image/") for image in page.images)
    assert all(image["alt"] for image in page.images)
    assert len(page.images) == (3 + 4) * len(tree["rows"])


def test_untrusted_text_is_escaped(tmp_path: Path):
    contract = make_contract(buckets=(SQUARE, WIDE))
    rows = [replace(row, key=NASTY + row.key) for row in make_qa_rows(contract, SQUARE, 2)]
    rejects = [RejectRow(NASTY, NASTY, NASTY, NASTY)]
    made = make(tmp_path, {f"s3://in/{NASTY}": rows}, contract, rejects)
    done = build_report(made, [NASTY], GATES, notes=[NASTY], decoder=NASTY)
    page = Read(done.to_html())
    assert "script" not in page.tags
    assert not any("example.com" in image["src"] for image in page.images)
    assert page.all_text.count("<script>") > 10
    assert json.loads(page.text["json"])["rows"][0]["key"].startswith(NASTY)


def test_dataset_without_qa_rows_is_not_sampled(tmp_path: Path):
    done = build_report(make(tmp_path, {"a.tar": []}), [], GATES)
    assert done.tree["verdict"]["status"] == "not_sampled"
    assert (done.tree["rows"], done.tree["measures"]) == ([], {})
    page = Read(done.to_html())
    assert "Nothing was sampled" in page.all_text
    assert page.images == []
    assert page.all_text.count(done.tree["fingerprint"]) == 2


def test_breach_fails_a_dataset_without_qa_rows(tmp_path: Path):
    done = build_report(make(tmp_path, {"a.tar": []}), ["too many rejects"], GATES)
    assert done.tree["verdict"]["status"] == "failed"


def test_empty_dataset_has_a_report(tmp_path: Path):
    write_dataset(tmp_path, make_contract(), {"a.tar": {}})
    done = build_report(open_dataset(str(tmp_path / "out")), [], GATES)
    assert done.tree["latents"] == {"channels": [], "scaling": None}
    assert "No latents are stored" in Read(done.to_html()).all_text


def test_report_of_one_qa_row(tmp_path: Path):
    contract = make_contract(buckets=(SQUARE, WIDE))
    made = make(tmp_path, {"a.tar": make_qa_rows(contract, SQUARE, 1)}, contract)
    done = build_report(made, [], Gates())
    (row,) = done.tree["rows"]
    assert row["shown_as"] == ["worst", "draw"]
    assert done.tree["measures"]["psnr_db"]["std"] == 0
    (card,) = Read(done.to_html()).cards
    assert "k0000" in card


def test_report_of_many_qa_rows_is_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    contract = make_contract(buckets=(SQUARE, WIDE))
    (row,) = make_qa_rows(contract, SQUARE, 1)
    rows = [replace(row, key=f"{i}") for i in range(2_000)]
    made = make(tmp_path, {f"{i}.tar": rows for i in range(5)}, contract)
    drawn = []

    def count(row: QaRow, *args: Any) -> RowPictures:
        drawn.append(row.key)
        return draw_row(row, *args)

    monkeypatch.setattr(report, "draw_row", count)
    done = build_report(made, [], GATES)
    assert done.tree["totals"]["num_qa_rows"] == 10_000
    assert len(drawn) == len(done.tree["rows"]) <= 18
    assert len(done.to_html()) < 300_000


# Where it is written, and what can be wrong.


def test_report_replaces_an_older_one_in_its_dataset(dataset: Dataset):
    build_report(dataset, ["no"], GATES).put(dataset)
    assert report_path(dataset) == "qa/report-00000001.html"
    done = build_report(dataset, [], GATES)
    done.put(dataset)
    assert dataset.store.read_bytes("qa/report-00000001.html").decode() == done.to_html()
    assert json.loads(dataset.store.read_bytes("qa/report-00000001.json")) == done.tree


def test_unwritable_target_is_named(dataset: Dataset, tmp_path: Path):
    done = build_report(dataset, [], GATES)
    done.save(tmp_path / "ok.html")
    assert (tmp_path / "ok.html").read_text() == done.to_html()
    for target in (tmp_path / "nowhere" / "x.html", tmp_path / "ok.html" / "x.json"):
        with pytest.raises(StorageError, match=r"cannot use .*x\."):
            done.save(target)
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(StorageError, match=r"folder\.html: .*[Dd]irectory"):
        done.save(tmp_path / "folder.html")
    with pytest.raises(ConfigError, match=r"name it \.html or \.json"):
        done.save(tmp_path / "report.pdf")


def test_missing_or_damaged_qa_file_is_named(dataset: Dataset, tmp_path: Path):
    shutil.copytree(dataset.url.removeprefix("file://"), tmp_path / "out")
    made = open_dataset(str(tmp_path / "out"))
    record = made.units[0]
    assert record.qa
    path = tmp_path / "out" / record.qa.file.path
    flip_byte(path, os.path.getsize(path) - 20)
    with pytest.raises(LatentCacheError, match=path.name):
        build_report(made, [], GATES)
    path.unlink()
    with pytest.raises(DatasetError, match=path.name):
        build_report(made, [], GATES)


def test_file_of_a_damaged_picture_is_named(tmp_path: Path):
    contract = make_contract(buckets=(SQUARE, WIDE))
    (row,) = make_qa_rows(contract, SQUARE, 1)
    made = make(tmp_path, {"a.tar": [replace(row, reconstruction=b"no picture")]}, contract)
    with pytest.raises(DatasetError, match=r"qa/.*is damaged"):
        build_report(made, [], GATES)


# In a browser.


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if not browser.EXECUTABLE:
        pytest.skip("no Chromium here: none of " + ", ".join(browser.NAMES))
    with Browser(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.fixture(scope="module")
def page_file(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "report.html"
    build_report(dataset, [], GATES).save(file)
    return file


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width_px", [1280, 390])
def test_browser_shows_the_page_without_requests_or_overflow(
    chromium: Browser, page_file: Path, psnrs: dict[str, float], width_px: int, scheme: str
):
    page = chromium.open(page_file, width_px=width_px, scheme=scheme)
    assert page.evaluate("document.images.length") > 60
    assert page.broken_images == []
    assert page.requests == []
    assert page.overflow_px == 0
    worst = min(psnrs, key=lambda key: psnrs[key])
    shown = page.evaluate("document.querySelector('#worst article').innerText")
    assert shown.startswith(worst)
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    levels = [int(level) for level in colour.strip("rgb()").split(",")]
    assert (min(levels) > 200) if scheme == "light" else (max(levels) < 60)


def test_click_enlarges_a_picture(chromium: Browser, page_file: Path):
    page = chromium.open(page_file)
    width_px = "document.querySelector('#row-0 img').getBoundingClientRect().width"
    assert page.evaluate(width_px) < 400
    page.evaluate("document.querySelector('#row-0 label').click()")
    assert page.evaluate(width_px) == page.evaluate("document.documentElement.clientWidth")
    page.evaluate("document.querySelector('#row-0 label').click()")
    assert page.evaluate(width_px) < 400


def test_browser_checks_detect_planted_faults(chromium: Browser, page_file: Path, tmp_path: Path):
    external = "http://127.0.0.1:9/x.png"
    plants = f'<img src="{external}" alt="outer"><p style="width: 999px">wide</p>'
    html = page_file.read_text().replace("</main>", f"{plants}</main>")
    guarded, bare = tmp_path / "guarded.html", tmp_path / "bare.html"
    guarded.write_text(html)
    bare.write_text(html.replace("Content-Security-Policy", "X-Nothing"))
    page = chromium.open(bare, width_px=390)
    assert page.requests == [external]
    assert page.broken_images == ["outer"]
    assert page.overflow_px > 500
    # The page's own policy blocks injected content: the picture is absent, and no request is sent.
    page = chromium.open(guarded, width_px=390)
    assert page.broken_images == ["outer"]
    assert page.requests == []
