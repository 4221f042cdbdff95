"""Evaluate several decoders on one set of latents, as on a model card.

The work is divided into pieces of one source shard each, for this process or for actors.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from typing import NamedTuple

from latentcache.config import Network, require_kind
from latentcache.config_eval import EvalConfig, EvalModel
from latentcache.config_types import Section
from latentcache.errors import SourceError
from latentcache.evaluation.card import (
    Evaluation,
    ModelResult,
    Spread,
    draw_side_by_side,
    render_card,
)
from latentcache.evaluation.measure import EvalSums, Piece, evaluate_piece
from latentcache.images.source import list_source
from latentcache.metrics import frechet_distance
from latentcache.networks import NUM_INCEPTION_FEATURES
from latentcache.storage import Store
from latentcache.vae.weights import absolute_url

Map = Callable[[Callable[[Piece], EvalSums], Iterable[Piece]], Iterator[EvalSums]]
"""A callable like the built-in `map`, with results in the order of the items."""

_NETWORKS = {"inception": "rFID", "lpips": "LPIPS", "vgg16": "PSIM"}


class EvalPlan(NamedTuple):
    """The plan of an evaluation, made before any model or image is loaded; URLs are absolute."""

    config: EvalConfig
    pieces: list[Piece]
    output: Store


def plan_evaluation(config: EvalConfig) -> EvalPlan:
    """List the shards, divide the images among them, and check that the output can be written."""
    require_kind(config, EvalConfig)
    shards = list_source(config.source)
    limits: Sequence[int | None] = [None] * len(shards)
    if config.max_images is not None:
        limits = _shares(config.max_images, len(shards))
    pieces = map(Piece, shards, limits, _shares(config.picture_rows, len(shards)))
    output = Store(config.output.url, config.output.storage)
    # Missing permissions must be found before hours of work.
    output.put("evaluation.probe", b"")
    output.delete("evaluation.probe")
    # Workers may have another working directory.
    networks = {
        name: _absolute(network, "url")
        for name, network in config.networks
        if isinstance(network, Network)
    }
    absolute = {
        "vae": _absolute(config.vae, "checkpoint"),
        "models": [_absolute(model, "checkpoint") for model in config.models],
        "networks": config.networks.model_copy(update=networks),
    }
    config = config.model_copy(update=absolute)
    return EvalPlan(config, [piece for piece in pieces if piece.max_images != 0], output)


def _absolute(section: Section, name: str) -> Section:
    return section.model_copy(update={name: absolute_url(getattr(section, name))})


def _shares(total: int, num_parts: int) -> list[int]:
    """Divide a number into parts that differ by at most one."""
    ends = (total * index // num_parts for index in range(num_parts + 1))
    return [end - start for start, end in pairwise(ends)]


def evaluate(
    plan: EvalPlan,
    run: Map = map,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Encode the images once, decode them with each model, measure, and write the results.

    Args:
        plan, run, progress: `run` maps over pieces; `progress` gets (pieces done, in total).

    Raises:
        ConfigError: a model does not belong to the VAE, or a file cannot be used.
        SourceError: no image could be read.
    """
    config, pieces, output = plan
    progress(0, len(pieces))
    sums = EvalSums()
    for done, part in enumerate(run(partial(evaluate_piece, config), pieces), start=1):
        sums.add(part)
        progress(done, len(pieces))
    if not sums.num_images:
        raise SourceError(f"none of the source's images could be read: {_counts(sums.rejects)}")
    evaluation = Evaluation(
        name=config.name,
        resolution_px=config.resolution_px,
        num_images=sums.num_images,
        rejects=dict(sums.rejects.most_common()),
        models=[_result(model, sums) for model in config.models],
        picture_keys=[picture.key for picture in sums.pictures],
        notes=list(_notes(config, sums)),
        output=output.url,
    )
    if sums.pictures:
        names = [model.name for model in config.models]
        output.put("evaluation.png", draw_side_by_side(names, sums.pictures))
    output.put("evaluation.md", f"{render_card(evaluation)}\n".encode())
    output.put("evaluation.json", json.dumps(asdict(evaluation), indent=1).encode())
    return evaluation


def _result(model: EvalModel, sums: EvalSums) -> ModelResult:
    spreads = {
        name: Spread(float(values.mean[0]), float(values.std[0]))
        for (owner, name), values in sums.statistics.items()
        if owner == model.name
    }
    rfid, originals = None, sums.statistics.get(("", "features"))
    if originals and originals.count > 1:
        rfid = frechet_distance(originals, sums.statistics[model.name, "features"])
    return ModelResult(
        name=model.name,
        train_steps=model.train_steps,
        rfid=rfid,
        psnr_db=spreads["psnr_db"],
        ssim=spreads["ssim"],
        psim=spreads.get("psim"),
        lpips=spreads.get("lpips"),
        link=model.link,
        comments=model.comments,
    )


def _notes(config: EvalConfig, sums: EvalSums) -> Iterator[str]:
    num_images = sums.num_images
    num_features = NUM_INCEPTION_FEATURES if config.networks.inception else 0
    if sums.rejects:
        yield f"{sums.rejects.total()} samples were rejected: {_counts(sums.rejects)}."
    for name, column in _NETWORKS.items():
        if getattr(config.networks, name) is None:
            yield f"{column} is empty: networks.{name} is not given."
    if num_features and num_images < 2:
        yield "rFID is empty: it needs at least two images."
    elif num_images < num_features:
        yield (
            f"rFID is from {num_images} images, fewer than its {num_features} features: it is too "
            "high, and comparable only on the same images."
        )
    for model, agreement_db in sums.agreements_db.items():
        yield (
            f"{model} has its own encoder, which agrees with that of `vae` to "
            f"{agreement_db:.0f} dB: its decoder was accepted."
        )


def _counts(rejects: Counter[str]) -> str:
    counts = [f"{reason} ({count})" for reason, count in rejects.most_common()]
    return ", ".join(counts) or "it has no sample"
