"""The QA report of a dataset: `figures.py` makes its content, plain JSON, and `html.py` renders it.

It needs neither a model nor a source image, and reads only the pictures of the rows that it shows.
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
from latentcache.dataset.receipts import UnitRecord
from latentcache.errors import ConfigError, one_line
from latentcache.qa import figures
from latentcache.qa.gates import Gates
from latentcache.qa.html import RowPictures, draw_row, render
from latentcache.qa.qa_files import MEASURES, QaFiles, read_measures, read_qa_rows
from latentcache.storage.failures import named_local

_READ_THREADS = 8

_LABELS = dict(zip(MEASURES, ("PSNR", "SSIM", "LPIPS", "drift", "PSNR cost"), strict=True))


@dataclass(frozen=True, slots=True)
class Report:
    """A report as plain JSON, and its pictures by the `id` of a row, or of a reject (JPEG)."""

    tree: dict[str, Any]
    pictures: dict[str, RowPictures]
    thumbnails: dict[str, bytes]

    def to_text(self) -> str:
        """Return the verdict and the figures in a few lines, for a terminal."""
        totals, status = self.tree["totals"], self.tree["verdict"]["status"].replace("_", " ")
        lines = [
            f"{status}: {totals['num_qa_rows']} of {totals['num_rows']} rows of manifest "
            f"{self.tree['manifest']} evaluated"
        ]
        for name, measure in self.tree["measures"].items():
            unit = " dB" if name.endswith("_db") else ""
            lines.append(
                f"{_LABELS[name]:10} {measure['mean']:8.3f} ± {measure['std']:.3f}{unit}, "
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

    def to_json(self) -> str:
        """Return the content of the report, without pictures, as JSON text."""
        return json.dumps(self.tree, indent=1, ensure_ascii=False, allow_nan=False)

    def to_html(self) -> str:
        """Return the report as one HTML file that loads and runs nothing."""
        return render(self.tree, self.pictures, self.thumbnails)

    def put(self, dataset: Dataset) -> None:
        """Put the report into its dataset, replacing an older one of the same manifest."""
        path = report_path(dataset)
        dataset.store.put(path.replace(".html", ".json"), self.to_json().encode())
        dataset.store.put(path, self.to_html().encode())

    def save(self, target: Path) -> None:
        """Write the report to a local file; see `require_writable`."""
        require_writable(target)
        text = self.to_json() if target.suffix == ".json" else self.to_html()
        with named_local(target):
            target.write_bytes(text.encode())


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
        dataset, files: the dataset, and its QA files; None means those of the run.
        breaches, notes, gates: the gates that fail, further lines, and the checked limits.
        decoder: the checkpoint that decoded the QA rows, if not the one that encoded them.
        num_shown, seed: the number of randomly drawn QA rows, and the seed of the draw. Up to half
            as many of the worst rows, and of those below the drift limit, are shown before them.
    """
    manifest = dataset.manifest
    provenance = read_provenance(dataset.store)
    files = files or QaFiles(dataset.store, dataset.units)
    measures = read_measures(files, dataset.contract)
    rows = _choose_rows(dataset, measures, gates, num_shown, seed)
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
        **figures.make_figures(dataset, measures),
        "rows": rows,
        "rejects": rejects,
        "contract": dataset.contract.to_json(),
        "fingerprint": dataset.contract.fingerprint,
        "provenance": provenance,
    }
    return Report(tree, _draw_rows(dataset, files, rows), thumbnails)


def _choose_rows(
    dataset: Dataset, measures: pa.Table, gates: Gates, num_shown: int, seed: int
) -> list[dict[str, Any]]:
    """Choose the QA rows to show, each with the reasons (`shown_as`), the worst rows first."""
    psnr_db, drift_db = measures["psnr_db"].to_numpy(), measures["drift_db"].to_numpy()
    num_worst, num_drawn = (num_shown + 1) // 2, min(num_shown, len(psnr_db))
    least_db = -np.inf if gates.min_drift_db is None else gates.min_drift_db
    by_drift = np.argsort(drift_db, kind="stable")[:num_worst]
    drawn = np.random.default_rng(seed).choice(len(psnr_db), num_drawn, replace=False)
    indices_by_reason = {
        "worst": np.argsort(psnr_db, kind="stable")[:num_worst],
        "drift": by_drift[drift_db[by_drift] < least_db],
        "draw": np.sort(drawn),
    }
    reasons: dict[int, list[str]] = {}
    for reason, indices in indices_by_reason.items():
        for index in indices.tolist():
            reasons.setdefault(index, []).append(reason)
    sources = {record.unit.id: record.unit.source for record in dataset.units}
    rows = measures.take(pa.array(reasons, pa.int64())).to_pylist()
    return [
        {"id": f"row-{number}", "shown_as": shown_as, "source": sources[row["unit"]], **row}
        for number, (row, shown_as) in enumerate(zip(rows, reasons.values(), strict=True))
    ]


def _draw_rows(
    dataset: Dataset, files: QaFiles, rows: Sequence[dict[str, Any]]
) -> dict[str, RowPictures]:
    """Read and draw the rows to show, unit by unit."""
    ids: dict[str, dict[str, str]] = {}  # by unit and key
    for row in rows:
        ids.setdefault(row["unit"], {})[row["key"]] = row["id"]
    num_channels = dataset.contract.vae.latent_channels
    mean, std = dataset.stats.mean[:num_channels], dataset.stats.std[:num_channels]

    def draw(record: UnitRecord) -> dict[str, RowPictures]:
        names = ids[record.unit.id]
        qa_rows = read_qa_rows(files.store, record, names)
        with naming_damage(files.store, record.qa.file.path if record.qa else ""):
            return {names[row.key]: draw_row(row, mean.tolist(), std.tolist()) for row in qa_rows}

    with ThreadPoolExecutor(_READ_THREADS) as pool:
        parts = pool.map(draw, (record for record in files.records if record.unit.id in ids))
        return {name: drawn for part in parts for name, drawn in part.items()}


def report_path(dataset: Dataset) -> str:
    """Return the path of a manifest's HTML report in its dataset; the JSON is beside it."""
    return f"qa/report-{dataset.manifest.number:08d}.html"


def require_writable(target: Path) -> None:
    """Raise an error if `Report.save` cannot write to a file; callers use it before long work."""
    if target.suffix not in (".html", ".json"):
        raise ConfigError(f"cannot write a report to {target}: name it .html or .json")
    with named_local(target), target.open("ab"):
        pass
