"""The figures of a report as plain JSON, from QA rows, statistics, rejects and receipts.

Keys end with the unit of measurement; counts begin with `num_`.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentcache.bottleneck import STAGES, PipelineLoad
from latentcache.dataset.bucket import Bucket
from latentcache.dataset.contract import VaeContract
from latentcache.dataset.reader import Dataset, RejectedRow
from latentcache.dataset.receipts import read_receipts
from latentcache.dataset.statistics import HISTOGRAM_EDGES, Float64, Statistics
from latentcache.image_files import rewrite_thumbnail
from latentcache.qa.qa_files import MEASURES

# `scaling_factor` should bring latents to unit variance. A larger relative error means a mistake,
# or images unlike those that the factor was measured on.
_MAX_SCALING_ERROR = 0.2

_MAX_RECEIPTS = 1000
_NUM_REJECT_EXAMPLES = 6


def make_figures(dataset: Dataset, measures: pa.Table) -> dict[str, Any]:
    """Return all figures of a dataset except its rejects.

    Args:
        dataset, measures: the dataset, and its table of `read_measures`.
    """
    counts = ("units", "samples", "rows", "rejects", "images", "extra_images")
    return {
        "totals": {
            **{f"num_{name}": getattr(dataset.manifest, f"num_{name}") for name in counts},
            "num_bytes": sum(file.size_bytes for unit in dataset.units for file in unit.files),
            "num_qa_rows": measures.num_rows,
            "mean_psnr_db": pc.mean(measures["psnr_db"]).as_py(),
            "min_drift_db": pc.min(measures["drift_db"]).as_py(),
        },
        "measures": distributions(measures),
        "buckets": _buckets(dataset.manifest.buckets, measures),
        "latents": _latents(dataset.contract.vae, dataset.stats),
        "throughput": _throughput(dataset),
    }


def distributions(measures: pa.Table) -> dict[str, Any]:
    """Summarise each measure that the rows of `read_measures` have."""
    columns = {name: measures[name].drop_null().to_numpy() for name in MEASURES}
    return {
        name: {
            "count": values.size,
            **{how: float(getattr(values, how)()) for how in ("mean", "std", "min", "max")},
            "histogram": _histogram(values),
        }
        for name, values in columns.items()
        if values.size
    }


def _histogram(values: Float64) -> dict[str, list[Any]]:
    """Count values in bins over the range of most values; the outer bins also hold the rest."""
    low, first, last, high = np.quantile(values, [0, 0.01, 0.99, 1])
    low, high = max(low, 2 * first - last), min(high, 2 * last - first)
    if high <= low:
        low, high = low - 0.5, high + 0.5
    num_bins = int(np.clip(2 * np.sqrt(values.size), 8, 40))
    counts, edges = np.histogram(values.clip(low, high), num_bins, (low, high))
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def _buckets(num_rows: dict[str, int], measures: pa.Table) -> list[dict[str, Any]]:
    """Return the numbers of rows of each bucket, and the quality of its QA rows."""
    figures = [("psnr_db", "mean"), ("psnr_db", "min"), ("ssim", "mean"), ("drift_db", "min")]
    groups = measures.group_by("bucket", use_threads=False).aggregate([("key", "count"), *figures])
    by_bucket = {row["bucket"]: row for row in groups.to_pylist()}
    result = []
    sizes = map(Bucket.parse, num_rows.keys() | by_bucket.keys())
    for size in sorted(sizes, key=lambda size: (size.num_pixels, size)):
        row = by_bucket.get(size.name, {})
        result.append(
            {
                "bucket": size.name,
                "num_rows": num_rows.get(size.name, 0),
                "num_qa_rows": row.get("key_count", 0),
                **{f"{how}_{name}": row.get(f"{name}_{how}") for name, how in figures},
            }
        )
    return result


def _latents(vae: VaeContract, stats: Statistics) -> dict[str, Any]:
    """Return per-channel statistics of the stored latents, and a check of `scaling_factor`."""
    if not stats.count:
        return {"channels": [], "scaling": None}
    num = vae.latent_channels
    names = [*map(str, range(num)), *(f"logvar {index}" for index in range(num))]
    step = HISTOGRAM_EDGES[1] - HISTOGRAM_EDGES[0]  # also the shown width of the two outer bins
    edges = np.array([HISTOGRAM_EDGES[0] - step, *HISTOGRAM_EDGES, HISTOGRAM_EDGES[-1] + step])
    channels = []
    for index, counts in enumerate(stats.histogram):
        used = np.flatnonzero(counts)
        first, end = used[0], used[-1] + 1
        bins = {"edges": edges[first : end + 1].tolist(), "counts": counts[first:end].tolist()}
        channels.append(
            {
                "name": names[index],
                "mean": float(stats.mean[index]),
                "std": float(stats.std[index]),
                "min": float(stats.minimum[index]),
                "max": float(stats.maximum[index]),
                "histogram": bins,
            }
        )
    return {"channels": channels, "scaling": _scaling(vae, stats.mean[:num], stats.std[:num])}


def _scaling(vae: VaeContract, mean: Float64, std: Float64) -> dict[str, Any]:
    """Compare `scaling_factor` with the factor that the latents' standard deviation requires.

    A model gets `(z - shift) * scaling_factor / latents_std`. `required` is the factor that brings
    this to unit standard deviation over all values together, including the differences between
    channels (Rombach et al. 2022, appendix G). Without `latents_std` it is 1 / std.
    """
    shift = np.array(vae.latents_mean or [vae.shift_factor])
    scale = vae.scaling_factor / np.array(vae.latents_std or [1.0])
    _, stored_std = _joint(mean, std)
    given_mean, given_std = _joint((mean - shift) * scale, std * scale)
    required = vae.scaling_factor / given_std if given_std else None
    return {
        "scaling_factor": vae.scaling_factor,
        "shift_factor": vae.shift_factor,
        "is_by_channel": vae.latents_std is not None,
        "stored_std": stored_std,
        "given_mean": given_mean,
        "given_std": given_std,
        "wanted": required,
        "is_off": required is None or abs(required / vae.scaling_factor - 1) > _MAX_SCALING_ERROR,
    }


def _joint(mean: Float64, std: Float64) -> tuple[float, float]:
    """Return the joint mean and standard deviation of channels of equal size."""
    joint = mean.mean()
    return float(joint), float(np.sqrt((std**2 + (mean - joint) ** 2).mean()))


def rejects(dataset: Dataset) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """Count rejects by reason, the most frequent first, with a few examples of each.

    The second value has the JPEG thumbnails of the examples that have one, by the example's `id`.
    """
    num_rejects: Counter[tuple[str, str]] = Counter()
    # By reason: the first examples with a thumbnail, and the first without.
    examples: dict[tuple[str, str], tuple[list[RejectedRow], list[RejectedRow]]] = {}
    for reject in dataset.rejects():
        kind = (reject.stage, reject.reason)
        num_rejects[kind] += 1
        first = examples.setdefault(kind, ([], []))[not reject.thumbnail]
        if len(first) < _NUM_REJECT_EXAMPLES:
            first.append(reject)
    reasons: list[dict[str, Any]] = []
    thumbnails = {}
    for (stage, reason), num in num_rejects.most_common():
        with_picture, others = examples[stage, reason]
        shown = []
        for number, reject in enumerate((with_picture + others)[:_NUM_REJECT_EXAMPLES]):
            name = f"reject-{len(reasons)}-{number}"
            # Written again, because the thumbnails of a dataset are untrusted.
            if thumbnail := rewrite_thumbnail(reject.thumbnail or b""):
                thumbnails[name] = thumbnail
            fields = ("unit", "source", "key", "message")
            shown.append({"id": name, **{field: getattr(reject, field) for field in fields}})
        reasons.append({"stage": stage, "reason": reason, "num_rejects": num, "examples": shown})
    return reasons, thumbnails


def _throughput(dataset: Dataset) -> dict[str, Any]:
    """Sum the times of each stage over the receipts, or over a thousand evenly spaced receipts."""
    num_units = len(dataset.units)
    num_read = min(num_units, _MAX_RECEIPTS)
    names = (dataset.units[index * num_units // num_read].name for index in range(num_read))
    receipts = [r for r in read_receipts(dataset.store, names) if r.stages is not None]
    loads = PipelineLoad()
    for receipt in receipts:
        loads.add_receipt(receipt.stages)
    stages = sorted(loads.stages.items(), key=lambda item: [*STAGES, item[0]].index(item[0]))
    times = ("busy_s", "wait_s", "num_threads")
    return {
        "num_units": num_units,
        "num_receipts": len(receipts),
        "num_samples": sum(receipt.record.num_samples for receipt in receipts),
        "bottleneck": loads.bottleneck_text,
        "stages": [
            {"stage": stage, **{name: getattr(load, name) for name in times}}
            for stage, load in stages
        ],
    }
