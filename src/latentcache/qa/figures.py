"""The figures of a report, from a dataset's QA rows, statistics, rejects and receipts.

All functions return plain JSON. Keys end with the unit of measurement; counts begin with `num_`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from latentcache.bottleneck import STAGES, PipelineLoad
from latentcache.dataset.bucket import Bucket
from latentcache.dataset.contract import Contract
from latentcache.dataset.reader import Dataset, RejectedRow
from latentcache.dataset.receipts import read_receipts
from latentcache.dataset.statistics import HISTOGRAM_EDGES, Statistics
from latentcache.qa.qa_files import MEASURES

# `scaling_factor` should bring latents to unit variance. A larger relative error means a mistake,
# or images unlike those that the factor was measured on.
_MAX_SCALING_ERROR = 0.2

_MAX_RECEIPTS = 1000
_NUM_REJECT_EXAMPLES = 6

Float64 = npt.NDArray[np.float64]


def totals(dataset: Dataset, measures: pa.Table) -> dict[str, Any]:
    """Count the contents of a dataset, and compute the two figures that gates check.

    Args:
        dataset: the dataset.
        measures: the measures of its QA rows; see `read_measures`.
    """
    manifest = dataset.manifest
    return {
        "num_units": manifest.num_units,
        "num_samples": manifest.num_samples,
        "num_rows": manifest.num_rows,
        "num_rejects": manifest.num_rejects,
        "num_images": manifest.num_images,
        "num_extra_images": manifest.num_extra_images,
        "num_bytes": sum(file.size_bytes for unit in dataset.units for file in unit.files),
        "num_qa_rows": measures.num_rows,
        "mean_psnr_db": pc.mean(measures["psnr_db"]).as_py(),
        "min_drift_db": pc.min(measures["drift_db"]).as_py(),
    }


def distributions(measures: pa.Table) -> dict[str, Any]:
    """Summarise each measure that QA rows have; `measures` is from `read_measures`."""
    summaries = {}
    for name in MEASURES:
        values = measures[name].drop_null().to_numpy()
        if values.size:
            summaries[name] = {
                "count": values.size,
                "mean": float(values.mean()),
                "std": float(values.std()),
                "min": float(values.min()),
                "max": float(values.max()),
                "histogram": _histogram(values),
            }
    return summaries


def _histogram(values: Float64) -> dict[str, list[Any]]:
    """Count values in bins over the range of most values; the outer bins also hold the rest."""
    low, first, last, high = np.quantile(values, [0, 0.01, 0.99, 1])
    low, high = max(low, 2 * first - last), min(high, 2 * last - first)
    if high <= low:
        low, high = low - 0.5, high + 0.5
    num_bins = int(np.clip(2 * np.sqrt(values.size), 8, 40))
    counts, edges = np.histogram(values.clip(low, high), num_bins, (low, high))
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def buckets(num_rows: dict[str, int], measures: pa.Table) -> list[dict[str, Any]]:
    """Return for each bucket its number of rows and of QA rows, and the quality of the QA rows.

    Args:
        num_rows: the number of rows by bucket.
        measures: the measures of the QA rows; see `read_measures`.
    """
    figures = [("psnr_db", "mean"), ("psnr_db", "min"), ("ssim", "mean"), ("drift_db", "min")]
    grouped = measures.group_by("bucket").aggregate([("key", "count"), *figures]).to_pylist()
    by_bucket = {row["bucket"]: row for row in grouped}
    result = []
    for bucket in sorted(num_rows.keys() | by_bucket.keys(), key=_area_and_width):
        row = by_bucket.get(bucket, {})
        result.append(
            {
                "bucket": bucket,
                "num_rows": num_rows.get(bucket, 0),
                "num_qa_rows": row.get("key_count", 0),
                **{f"{how}_{name}": row.get(f"{name}_{how}") for name, how in figures},
            }
        )
    return result


def _area_and_width(bucket: str) -> tuple[int, int]:
    width_px, height_px = Bucket.parse(bucket)
    return width_px * height_px, width_px


def latents(contract: Contract, stats: Statistics) -> dict[str, Any]:
    """Return per-channel statistics of the stored latents, and a check of `scaling_factor`.

    Args:
        contract: the dataset's contract.
        stats: the statistics of its latents.
    """
    if not stats.count:
        return {"channels": [], "scaling": None}
    num = contract.vae.latent_channels
    names = [*map(str, range(num)), *(f"logvar {index}" for index in range(num))]
    step = HISTOGRAM_EDGES[1] - HISTOGRAM_EDGES[0]  # also the shown width of the two outer bins
    edges = np.array([HISTOGRAM_EDGES[0] - step, *HISTOGRAM_EDGES, HISTOGRAM_EDGES[-1] + step])
    channels = []
    for index, counts in enumerate(stats.histogram):
        used = np.flatnonzero(counts)
        first, end = used[0], used[-1] + 1
        channels.append(
            {
                "name": names[index],
                "mean": float(stats.mean[index]),
                "std": float(stats.std[index]),
                "min": float(stats.minimum[index]),
                "max": float(stats.maximum[index]),
                "histogram": {
                    "edges": edges[first : end + 1].tolist(),
                    "counts": counts[first:end].tolist(),
                },
            }
        )
    return {"channels": channels, "scaling": _scaling(contract, stats)}


def _scaling(contract: Contract, stats: Statistics) -> dict[str, Any]:
    """Compare `scaling_factor` with the factor that the latents' standard deviation requires.

    Latents are rescaled to unit standard deviation over all their values together, including the
    differences between channels (Rombach et al. 2022, appendix G). A model gets
    `(z - shift) * scaling_factor / latents_std`. `wanted` is the factor that brings this expression
    to a standard deviation of one. Without `latents_std` it is 1 / std.
    """
    vae = contract.vae
    mean, std = stats.mean[: vae.latent_channels], stats.std[: vae.latent_channels]
    shift = np.array(vae.latents_mean or [vae.shift_factor])
    scale = vae.scaling_factor / np.array(vae.latents_std or [1.0])
    _, stored_std = _joint(mean, std)
    given_mean, given_std = _joint((mean - shift) * scale, std * scale)
    wanted = vae.scaling_factor / given_std if given_std else None
    return {
        "scaling_factor": vae.scaling_factor,
        "shift_factor": vae.shift_factor,
        "is_by_channel": vae.latents_std is not None,
        "stored_std": stored_std,
        "given_mean": given_mean,
        "given_std": given_std,
        "wanted": wanted,
        "is_off": wanted is None or abs(wanted / vae.scaling_factor - 1) > _MAX_SCALING_ERROR,
    }


def _joint(mean: Float64, std: Float64) -> tuple[float, float]:
    """Return the joint mean and standard deviation of channels of equal size."""
    joint = mean.mean()
    return float(joint), float(np.sqrt((std**2 + (mean - joint) ** 2).mean()))


@dataclass(slots=True)
class _Reason:
    """The rejects of one reason: their number and the first examples with and without a picture."""

    num_rejects: int = 0
    pictured: list[RejectedRow] = field(default_factory=list)
    others: list[RejectedRow] = field(default_factory=list)

    def add(self, reject: RejectedRow) -> None:
        self.num_rejects += 1
        examples = self.pictured if reject.thumbnail else self.others
        if len(examples) < _NUM_REJECT_EXAMPLES:
            examples.append(reject)


def rejects(dataset: Dataset) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """Count rejects by reason, the most frequent first, with a few examples of each.

    Returns:
        The reasons, and the JPEG thumbnails of the examples that have one, by the example's `id`.
    """
    reasons: dict[tuple[str, str], _Reason] = {}
    for reject in dataset.rejects():
        reasons.setdefault((reject.stage, reject.reason), _Reason()).add(reject)
    result: list[dict[str, Any]] = []
    thumbnails = {}
    for (stage, reason), group in sorted(reasons.items(), key=lambda item: -item[1].num_rejects):
        examples: list[dict[str, Any]] = []
        for reject in (group.pictured + group.others)[:_NUM_REJECT_EXAMPLES]:
            name = f"reject-{len(result)}-{len(examples)}"
            if reject.thumbnail:
                thumbnails[name] = reject.thumbnail
            fields = ("unit", "source", "key", "message")
            examples.append({"id": name, **{f: getattr(reject, f) for f in fields}})
        result.append(
            {
                "stage": stage,
                "reason": reason,
                "num_rejects": group.num_rejects,
                "examples": examples,
            }
        )
    return result, thumbnails


def throughput(dataset: Dataset) -> dict[str, Any]:
    """Sum the times of each stage over the receipts, or over a thousand evenly spaced receipts."""
    num_units = len(dataset.units)
    num_read = min(num_units, _MAX_RECEIPTS)
    records = [dataset.units[index * num_units // num_read] for index in range(num_read)]
    loads = PipelineLoad()
    num_receipts = num_samples = 0
    for receipt in read_receipts(dataset.store, (record.name for record in records)):
        if receipt.stages is None:
            continue
        num_receipts += 1
        num_samples += receipt.record.num_samples
        loads.add_receipt(receipt.stages)
    order = {stage: number for number, stage in enumerate(STAGES)}
    stages = sorted(loads.stages.items(), key=lambda item: order.get(item[0], len(order)))
    return {
        "num_units": num_units,
        "num_receipts": num_receipts,
        "num_samples": num_samples,
        "bottleneck": loads.bottleneck_text,
        "stages": [
            {
                "stage": stage,
                "busy_s": load.busy_s,
                "wait_s": load.wait_s,
                "num_threads": load.num_threads,
            }
            for stage, load in stages
        ],
    }
