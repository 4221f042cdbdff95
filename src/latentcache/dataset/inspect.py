"""Summarize a dataset for `latentcache inspect`."""

from __future__ import annotations

from collections import Counter
from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from latentcache.dataset.reader import Dataset
from latentcache.errors import one_line

_FIGURES = ("mean", "std", "min", "max")


def describe(dataset: Dataset, num_rows: int) -> dict[str, Any]:
    """Return a summary of a dataset as JSON: contract, totals, buckets, statistics, rejects, rows.

    Args:
        dataset, num_rows: the dataset, and how many of its first rows to include.
    """
    manifest, stats = dataset.manifest, dataset.stats
    reasons = Counter(f"{reject.stage}: {reject.reason}" for reject in dataset.rejects())
    columns = [values.tolist() for values in (stats.mean, stats.std, stats.minimum, stats.maximum)]
    channels = [dict(zip(_FIGURES, row, strict=True)) for row in zip(*columns, strict=True)]
    return {
        "url": dataset.url,
        "manifest": manifest.number,
        "complete": manifest.complete,
        "created_at": manifest.created_at,
        "num_units": manifest.num_units,
        "num_rows": manifest.num_rows,
        "num_rejects": manifest.num_rejects,
        "num_bytes": sum(file.size_bytes for unit in dataset.units for file in unit.files),
        "buckets": manifest.buckets,
        "stale": list(manifest.stale),
        "contract": dataset.contract.to_json(),
        "channels": channels if stats.count else [],
        "rejects_by_reason": dict(reasons.most_common()),
        "rows": [
            {
                "unit": row.unit,
                "key": row.key,
                "latent_shape": list(row.latent.shape),
                "original_size": [row.original_width, row.original_height],
                "crop_top_left": [row.crop_top, row.crop_left],
                **row.columns,
            }
            for row in dataset[: max(num_rows, 0)]
        ],
    }


def render(described: dict[str, Any]) -> str:
    """Return the result of `describe` as text for a terminal."""
    text = StringIO()
    console = Console(file=text, width=100, highlight=False)
    contract = described["contract"]
    terms = contract["latents"]
    console.print(_plain(f"{described['url']}, manifest {described['manifest']}"))
    if not described["complete"]:
        console.print("not complete: units are missing")
    facts = {
        "rows": described["num_rows"],
        "rejects": described["num_rejects"],
        "units": described["num_units"],
        "size": f"{described['num_bytes'] / 2**20:.1f} MiB",
        "made": described["created_at"],
        "encoder": contract["vae"]["encoder_fingerprint"][:16],
        "scaling, shift": f"{contract['vae']['scaling_factor']}, {contract['vae']['shift_factor']}",
        "latents": ", ".join(terms[n] for n in ("posterior", "dtype", "format", "precision")),
    }
    if quantization := terms.get("quantization"):
        facts["calibrated on"] = (
            f"up to {quantization['num_images']} images, seed {quantization['seed']}"
        )
    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        table.add_row(name, _plain(value))
    console.print(table)
    _print_table(console, "buckets", ("size", "rows"), described["buckets"].items())
    channels = [
        (index, *(f"{channel[name]:.4f}" for name in _FIGURES))
        for index, channel in enumerate(described["channels"])
    ]
    _print_table(console, "stored latents", ("channel", *_FIGURES), channels)
    _print_table(console, "rejects", ("reason", "samples"), described["rejects_by_reason"].items())
    rows = [{k: v for k, v in row.items() if k != "unit"} for row in described["rows"]]
    _print_table(console, "rows", tuple(rows[0]) if rows else (), [row.values() for row in rows])
    for source in described["stale"]:
        console.print(one_line(f"stale: {source}"), markup=False)
    return text.getvalue().rstrip()


def _print_table(console: Console, title: str, names: tuple[str, ...], rows: Any) -> None:
    if rows:
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for name in names:
            table.add_column(_plain(name))
        for row in rows:
            table.add_row(*map(_plain, row))
        console.print()
        console.print(table)


def _plain(value: object) -> Text:
    """Return a value as literal text, so that a caption is not read as markup or terminal codes."""
    return Text(one_line(str(value)))
