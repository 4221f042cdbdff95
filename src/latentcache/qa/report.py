"""The QA report of a dataset.

The content is one tree of plain JSON (`figures.py`). `html.py` renders that tree with pictures
(`row_pictures.py`). All data comes from the dataset; no model and no source image is needed. The
report of a large dataset is small too: it shows a few rows, and only their pictures are read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from latentcache.dataset.contract import read_provenance
from latentcache.dataset.parquet import naming_damage
from latentcache.dataset.reader import Dataset
from latentcache.errors import ConfigError, one_line
from latentcache.image_files import rewrite_thumbnail
from latentcache.qa import figures, html
from latentcache.qa.gates import Gates
from latentcache.qa.qa_files import QaFiles, read_measures, read_qa_rows
from latentcache.qa.row_pictures import RowPictures, draw_row
from latentcache.storage.failures import named_local

_READ_THREADS = 8

_LABELS = {
    "psnr_db": ("PSNR", " dB"),
    "ssim": ("SSIM", ""),
    "lpips": ("LPIPS", ""),
    "drift_db": ("drift", " dB"),
    "psnr_cost_db": ("PSNR cost", " dB"),
}


@dataclass(frozen=True, slots=True)
class Report:
    """The content of a report (`tree`, plain JSON) and its pictures.

    `pictures` has the `id` of a row in the tree as key; `thumbnails` (JPEG) has that of a reject.
    """

    tree: dict[str, Any]
    pictures: dict[str, RowPictures]
    thumbnails: dict[str, bytes]

    def to_json(self) -> dict[str, Any]:
        """Return the content of the report, without pictures."""
        return self.tree

    def to_text(self) -> str:
        """Return the verdict and the figures in a few lines, for a terminal."""
        verdict, totals = self.tree["verdict"], self.tree["totals"]
        lines = [
            f"{verdict['status'].replace('_', ' ')}: {totals['num_qa_rows']} of "
            f"{totals['num_rows']} rows of manifest {self.tree['manifest']} evaluated"
        ]
        for name, measure in self.tree["measures"].items():
            label, unit = _LABELS[name]
            lines.append(
                f"{label:10} {measure['mean']:8.3f} ± {measure['std']:.3f}{unit}, "
                f"from {measure['min']:.3f} to {measure['max']:.3f}"
            )
        return "\n".join([*lines, *self.worst_rows])

    @property
    def worst_rows(self) -> list[str]:
        """The worst rows, one line each."""
        return [
            one_line(
                f"worst: PSNR {row['psnr_db']:.2f} dB, drift {row['drift_db']:.1f} dB: "
                f"{row['key']} ({row['bucket']}) of {row['source']}"
            )
            for row in self.tree["rows"]
            if {"worst", "drift"} & set(row["shown_as"])
        ]

    def to_html(self) -> str:
        """Return the report as one self-contained HTML file: no network, no script, no font."""
        return html.render(self.tree, self.pictures, self.thumbnails)


def build_report(
    dataset: Dataset,
    breaches: Sequence[str],
    gates: Gates,
    *,
    notes: Sequence[str] = (),
    decoder: str | None = None,
    files: QaFiles | None = None,
    num_shown: int = 12,
    seed: int = 0,
) -> Report:
    """Build the report of a dataset from its QA files.

    Args:
        dataset: the dataset.
        breaches: a line for each gate that fails; see `QaTotals.breaches`.
        gates: the limits that were checked.
        notes: further lines for the reader.
        decoder: the checkpoint that decoded the QA rows; None means the one that encoded them.
        files: the QA files to report on; None means those of the run.
        num_shown: the number of randomly drawn QA rows. Half as many of the worst rows are shown
            before them, and at most half as many of the rows below the drift limit.
        seed: the seed of the random draw.

    Raises:
        DatasetError: a QA file, a rejects file or a receipt is missing or damaged.
        StorageError: the store cannot be reached.
    """
    manifest = dataset.manifest
    provenance = read_provenance(dataset.store)
    files = files or QaFiles(dataset.store, dataset.units)
    measures = read_measures(files.store, files.records)
    rows = _rows(dataset, measures, _choose(measures, gates, num_shown, seed))
    rejects, thumbnails = figures.rejects(dataset)
    status = "failed" if breaches else "passed" if measures.num_rows else "not_sampled"
    tree = {
        "name": provenance.get("name"),
        "url": dataset.url,
        "manifest": manifest.number,
        "created_at": manifest.created_at,
        "complete": manifest.complete,
        "stale": list(manifest.stale),
        "verdict": {"status": status, "breaches": list(breaches), "notes": list(notes)},
        "gates": asdict(gates),
        "decoder": decoder or provenance.get("checkpoint"),
        "totals": figures.totals(dataset, measures),
        "measures": figures.distributions(measures),
        "buckets": figures.buckets(manifest.buckets, measures),
        "rows": rows,
        "latents": figures.latents(dataset.contract, dataset.stats),
        "rejects": rejects,
        "throughput": figures.throughput(dataset),
        "contract": dataset.contract.to_json(),
        "fingerprint": dataset.contract.fingerprint,
        "provenance": provenance,
    }
    redrawn = {name: rewrite_thumbnail(data) for name, data in thumbnails.items()}
    usable = {name: data for name, data in redrawn.items() if data}
    return Report(tree, _draw_rows(dataset, files, rows), usable)


def report_path(dataset: Dataset) -> str:
    """Return the path of a manifest's HTML report in its dataset; the JSON is beside it."""
    return f"qa/report-{dataset.manifest.number:08d}.html"


def write_report(report: Report, dataset: Dataset) -> None:
    """Put a report into its dataset, replacing an older one of the same manifest.

    Args:
        report: the report.
        dataset: its dataset.
    """
    path = report_path(dataset)
    dataset.store.put(path.replace(".html", ".json"), _json_bytes(report))
    dataset.store.put(path, report.to_html().encode())


def require_writable(target: Path) -> None:
    """Raise an error if a report cannot be written to a local file; see `save_report`.

    Callers use it before long work.

    Raises:
        ConfigError: the name ends with neither `.html` nor `.json`.
        StorageError: the file cannot be written.
    """
    if target.suffix not in (".html", ".json"):
        raise ConfigError(f"cannot write a report to {target}: name it .html or .json")
    with named_local(target), target.open("ab"):
        pass


def save_report(report: Report, target: Path) -> None:
    """Write a report to a local file: HTML, or JSON if its name ends with `.json`.

    Args:
        report: the report.
        target: the file.

    Raises:
        ConfigError: the name ends with neither `.html` nor `.json`.
        StorageError: the file cannot be written.
    """
    require_writable(target)
    data = _json_bytes(report) if target.suffix == ".json" else report.to_html().encode()
    with named_local(target):
        target.write_bytes(data)


def _json_bytes(report: Report) -> bytes:
    return json.dumps(report.to_json(), indent=1, ensure_ascii=False, allow_nan=False).encode()


def _choose(measures: pa.Table, gates: Gates, num_shown: int, seed: int) -> dict[int, list[str]]:
    """Choose the QA rows to show: a dict from index to reasons, the worst rows first."""
    psnr_db, drift_db = measures["psnr_db"].to_numpy(), measures["drift_db"].to_numpy()
    num_worst = (num_shown + 1) // 2
    least_db = -np.inf if gates.min_drift_db is None else gates.min_drift_db
    by_drift = np.argsort(drift_db, kind="stable")[:num_worst]
    num_drawn = min(num_shown, len(psnr_db))
    drawn = np.random.default_rng(seed).choice(len(psnr_db), num_drawn, replace=False)
    reasons = {
        "worst": np.argsort(psnr_db, kind="stable")[:num_worst],
        "drift": by_drift[drift_db[by_drift] < least_db],
        "draw": np.sort(drawn),
    }
    chosen: dict[int, list[str]] = {}
    for reason, indices in reasons.items():
        for index in indices.tolist():
            chosen.setdefault(index, []).append(reason)
    return chosen


def _rows(
    dataset: Dataset, measures: pa.Table, chosen: dict[int, list[str]]
) -> list[dict[str, Any]]:
    sources = {record.unit.id: record.unit.source for record in dataset.units}
    rows = measures.take(pa.array(chosen, pa.int64())).to_pylist()
    return [
        {"id": f"row-{number}", "shown_as": reasons, "source": sources[row["unit"]], **row}
        for number, (row, reasons) in enumerate(zip(rows, chosen.values(), strict=True))
    ]


def _draw_rows(
    dataset: Dataset, files: QaFiles, rows: Sequence[dict[str, Any]]
) -> dict[str, RowPictures]:
    """Read and draw the rows to show, unit by unit."""
    records = {record.unit.id: record for record in files.records}
    ids_by_unit: dict[str, dict[str, str]] = {}
    for row in rows:
        ids_by_unit.setdefault(row["unit"], {})[row["key"]] = row["id"]
    num_channels = dataset.contract.vae.latent_channels
    mean, std = dataset.stats.mean[:num_channels], dataset.stats.std[:num_channels]

    def draw(unit: str) -> dict[str, RowPictures]:
        record, ids = records[unit], ids_by_unit[unit]
        assert record.qa
        qa_rows = read_qa_rows(files.store, record, ids)
        with naming_damage(files.store, record.qa.file.path):
            return {ids[row.key]: draw_row(row, mean.tolist(), std.tolist()) for row in qa_rows}

    with ThreadPoolExecutor(_READ_THREADS) as pool:
        parts = pool.map(draw, ids_by_unit)
        return {name: drawn for part in parts for name, drawn in part.items()}
