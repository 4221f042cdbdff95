"""Evaluate several decoders on one set of latents, as on a model card.

The work is divided into pieces of one source shard each. Any callable like `map` may run them: in
this process, or in the actors of a cluster.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Protocol, TypeVar

from latentcache.config import Network, require_kind
from latentcache.config_eval import EvalConfig, EvalModel
from latentcache.errors import SourceError
from latentcache.evaluation.card import (
    Evaluation,
    ModelResult,
    Spread,
    draw_side_by_side,
    render_card,
)
from latentcache.evaluation.measure import (
    EvalJob,
    EvalSums,
    ModelSums,
    Piece,
    evaluate_piece,
)
from latentcache.images.source import list_source, source_contract
from latentcache.metrics import FeatureStatistics, frechet_distance
from latentcache.storage import Store
from latentcache.vae.weights import absolute_url

A = TypeVar("A")
B = TypeVar("B")

_NETWORKS = {"inception": "rFID", "lpips": "LPIPS", "vgg16": "PSIM"}


class Map(Protocol):
    """A callable like the built-in `map`, with results in the order of the items."""

    def __call__(self, function: Callable[[A], B], items: Iterable[A], /) -> Iterator[B]:
        """Yield the result of the function for each item.

        Args:
            function: the function.
            items: its arguments.
        """


@dataclass(frozen=True, slots=True)
class EvalPlan:
    """The plan of an evaluation, made before any model or image is loaded."""

    config: EvalConfig
    job: EvalJob
    pieces: tuple[Piece, ...]
    output: Store


def plan_evaluation(config: EvalConfig) -> EvalPlan:
    """List the shards, divide the images among them, and check that the output can be written.

    Raises:
        ConfigError: the `source` section is wrong.
        SourceError: a named shard is missing, or a glob matches nothing.
        StorageError: a store cannot be reached or written.
    """
    require_kind(config, EvalConfig)
    shards = list_source(config.source)
    pictures = _shares(config.picture_rows, len(shards))
    limits: Sequence[int | None] = [None] * len(shards)
    if config.max_images is not None:
        limits = _shares(config.max_images, len(shards))
    pieces = map(Piece, shards, limits, pictures)
    output = Store(config.output.url, config.output.storage)
    # Missing permissions must be found before hours of work.
    output.put("evaluation.probe", b"")
    output.delete("evaluation.probe")
    job = EvalJob(
        source=source_contract(config.source),
        source_storage=config.source.storage,
        resolution_px=config.resolution_px,
        vae=config.vae.model_copy(update={"checkpoint": absolute_url(config.vae.checkpoint)}),
        models=tuple(
            model.model_copy(update={"checkpoint": absolute_url(model.checkpoint)})
            for model in config.models
        ),
        networks=config.networks.model_copy(
            update={name: _absolute(getattr(config.networks, name)) for name in _NETWORKS}
        ),
        batch_size=config.compute.batch_size,
        device="cuda" if config.compute.num_gpus else "cpu",
    )
    return EvalPlan(config, job, tuple(p for p in pieces if p.max_images != 0), output)


def _absolute(network: Network | None) -> Network | None:
    """Make the URL of a network absolute, for processes with another working directory."""
    return network and network.model_copy(update={"url": Store(network.url).url})


def _shares(total: int, num_parts: int) -> list[int]:
    """Divide a number into parts that differ by at most one."""
    return [
        total * (index + 1) // num_parts - total * index // num_parts for index in range(num_parts)
    ]


def evaluate(
    plan: EvalPlan,
    run: Map = map,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Encode the images once, decode them with each model, measure, and write the results.

    The output gets `evaluation.md` (the card's table), `evaluation.json` (the same with all digits)
    and `evaluation.png` (the images side by side). Existing files are replaced.

    Args:
        plan: from `plan_evaluation`.
        run: runs the pieces.
        progress: called with (pieces done, pieces in total).

    Raises:
        ConfigError: a model is of another family than the VAE, or belongs to another encoder; or a
            checkpoint or a network cannot be used.
        SourceError: no image could be read.
        StorageError: a store failed.
    """
    config, job, pieces = plan.config, plan.job, plan.pieces
    progress(0, len(pieces))
    sums = EvalSums.empty(job)
    for done, part in enumerate(run(partial(evaluate_piece, job), pieces), start=1):
        sums = sums.merge(part)
        progress(done, len(pieces))
    if not sums.num_images:
        raise SourceError(f"none of the source's images could be read: {_counts(sums.rejects)}")
    evaluation = Evaluation(
        name=config.name,
        resolution_px=config.resolution_px,
        num_images=sums.num_images,
        rejects=dict(sums.rejects.most_common()),
        models=[
            _result(job, model, model_sums, sums.features)
            for model, model_sums in zip(config.models, sums.models, strict=True)
        ],
        picture_keys=[picture.key for picture in sums.pictures],
        notes=list(_notes(job, sums)),
        output=plan.output.url,
    )
    if sums.pictures:
        names = [model.name for model in config.models]
        plan.output.put("evaluation.png", draw_side_by_side(names, sums.pictures))
    plan.output.put("evaluation.md", f"{render_card(evaluation)}\n".encode())
    plan.output.put("evaluation.json", json.dumps(asdict(evaluation), indent=1).encode())
    return evaluation


def _result(
    job: EvalJob, model: EvalModel, sums: ModelSums, originals: FeatureStatistics
) -> ModelResult:
    means, stds = sums.measures.mean.tolist(), sums.measures.std.tolist()
    spreads = dict(zip(job.measures, map(Spread, means, stds), strict=True))
    return ModelResult(
        name=model.name,
        train_steps=model.train_steps,
        rfid=frechet_distance(originals, sums.features) if _has_rfid(job, originals) else None,
        psnr_db=spreads["psnr_db"],
        ssim=spreads["ssim"],
        psim=spreads.get("psim"),
        lpips=spreads.get("lpips"),
        link=model.link,
        comments=model.comments,
    )


def _has_rfid(job: EvalJob, originals: FeatureStatistics) -> bool:
    return job.num_features > 0 and originals.count > 1


def _notes(job: EvalJob, sums: EvalSums) -> Iterator[str]:
    if sums.rejects:
        yield f"{sums.rejects.total()} samples were rejected: {_counts(sums.rejects)}."
    for name, column in _NETWORKS.items():
        if getattr(job.networks, name) is None:
            yield f"{column} is empty: networks.{name} is not given."
    if job.num_features and not _has_rfid(job, sums.features):
        yield "rFID is empty: it needs at least two images."
    elif sums.num_images < job.num_features:
        yield (
            f"rFID is from {sums.num_images} images, fewer than its {job.num_features} features: "
            "it is too high, and comparable only on the same images."
        )
    for model, model_sums in zip(job.models, sums.models, strict=True):
        if model_sums.agreement_db is not None:
            yield (
                f"{model.name} has its own encoder, which agrees with that of `vae` to "
                f"{model_sums.agreement_db:.0f} dB: its decoder was accepted."
            )


def _counts(rejects: Counter[str]) -> str:
    counts = [f"{reason} ({count})" for reason, count in rejects.most_common()]
    return ", ".join(counts) or "it has no sample"
