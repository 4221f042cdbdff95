"""Commands that measure quality: `qa`, `eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from latentcache.cli import base

if TYPE_CHECKING:
    from latentcache.config import Qa
    from latentcache.dataset.reader import Dataset
    from latentcache.qa.reevaluate import Selection
    from latentcache.storage_options import StorageOptions

_Rows = Annotated[int, Option("--rows", min=1, help="Number of rows to check, over all buckets.")]
_Units = Annotated[
    int,
    Option(
        "--units",
        min=0,
        help="Number of source shards to read again. 0 uses the crops that the run kept.",
    ),
]
_Sources = Annotated[
    list[str] | None,
    Option(
        metavar="URL",
        help="Shards, a glob or a folder that --units may read. It is required with the URL of "
        "a dataset, whose own URLs are not opened. Repeatable.",
    ),
]
_Seed = Annotated[int, Option(min=0, help="Random seed that chooses the rows.")]
_Checkpoint = Annotated[
    str | None,
    Option(help="Checkpoint of the dataset's VAE. Default: the config's, `demo`, or the decoder."),
]
_Decoder = Annotated[
    str | None,
    Option(
        help="Checkpoint whose decoder is used. Default: the VAE's. The URL of a dataset needs "
        "this or --checkpoint, unless the demo VAE encoded the dataset."
    ),
]
_MinPsnr = Annotated[
    float | None, Option(help="Fail if the mean PSNR is below this, in dB.", show_default="15")
]
_MinDrift = Annotated[
    float | None,
    Option(
        help="Fail if a latent's signal-to-noise ratio to an fp32 encode is below this, in dB.",
        show_default="30",
    ),
]
_MaxRejects = Annotated[
    int | None, Option(help="Fail if there are more rejects than this.", show_default="any")
]
_Report = Annotated[Path | None, Option(help="Write the report to this .html or .json file.")]


@base.app.command("qa")
@base.command
def qa_command(
    target: base.Target,
    set_: base.Overrides = None,
    manifest: base.ManifestNumber = None,
    num_rows: _Rows = 256,
    num_units: _Units = 0,
    source: _Sources = None,
    seed: _Seed = 0,
    checkpoint: _Checkpoint = None,
    decoder: _Decoder = None,
    min_psnr_db: _MinPsnr = None,
    min_drift_db: _MinDrift = None,
    max_rejects: _MaxRejects = None,
    report: _Report = None,
    json_: base.Json = False,
) -> int:
    """Decode stored latents and compare them with their images. Exits 3 if a gate fails.

    The section `qa` of a config has the decoder and the gates. Options override it.
    """
    from dataclasses import replace

    from latentcache.config import Qa
    from latentcache.dataset.reader import open_dataset
    from latentcache.images.moved import moved_of
    from latentcache.qa.reevaluate import Selection
    from latentcache.qa.report import require_writable
    from latentcache.storage_options import StorageOptions

    url, options, config = base.locate(target, set_)
    gates = {
        "min_psnr_db": min_psnr_db,
        "min_drift_db": min_drift_db,
        "max_rejects": max_rejects,
        "decoder": decoder or None,
    }
    qa = (config.qa if config else None) or Qa()
    qa = qa.model_copy(update={name: value for name, value in gates.items() if value is not None})
    selection = Selection(num_rows, num_units, seed, tuple(source or ()))
    vae_storage = StorageOptions()
    if config:
        urls = config.source.folder or config.source.shards or ()
        selection = replace(
            selection,
            sources=(*([urls] if isinstance(urls, str) else urls), *selection.sources),
            source_storage=config.source.storage,
            moved=moved_of(config.source),
        )
        checkpoint, vae_storage = checkpoint or config.vae.checkpoint, config.vae.storage
    if report:
        require_writable(report)
    dataset = open_dataset(url, manifest, storage=options)
    return _evaluate(dataset, qa, selection, checkpoint, vae_storage, report, json_)


def _evaluate(
    dataset: Dataset,
    qa: Qa,
    selection: Selection,
    checkpoint: str | None,
    vae_storage: StorageOptions,
    report: Path | None,
    as_json: bool,
) -> int:
    """Evaluate rows of a dataset, print and save the report; return the exit code."""
    from tempfile import TemporaryDirectory

    from latentcache.qa.evaluator import QaModels
    from latentcache.qa.gates import Gates
    from latentcache.qa.reevaluate import reevaluate
    from latentcache.qa.report import build_report

    lpips = (qa.lpips.url, qa.lpips.sha256) if qa.lpips else None
    models, gates = QaModels(qa.decoder, lpips, qa.storage, qa.storage), Gates.of(qa)
    with TemporaryDirectory(prefix="latentcache-") as folder:
        with base.progress("decoding", selection.num_rows) as update:
            result = reevaluate(
                dataset,
                models,
                selection,
                gates,
                Path(folder),
                checkpoint=checkpoint,
                checkpoint_storage=vae_storage,
                progress=update,
            )
        made = build_report(
            dataset,
            result.breaches,
            gates,
            notes=result.notes,
            decoder=result.decoder,
            files=result.files,
        )
        if report:
            made.save(report)
    for line in (*result.notes, *(f"QA: {breach}" for breach in result.breaches)):
        base.complain(line)
    base.print_result(made.tree, made.to_text().split("\n"), as_json)
    return 3 if result.breaches else 0


@base.app.command("eval")
@base.command
def eval_command(
    config: base.ConfigPath, set_: base.Overrides = None, json_: base.Json = False
) -> None:
    """Compare decoders on your images: print the table of the sd-vae-ft-mse model card."""
    from contextlib import ExitStack

    from latentcache.config_eval import load_eval_config
    from latentcache.evaluation.card import render_card
    from latentcache.evaluation.evaluate import Map, evaluate, plan_evaluation

    parsed = load_eval_config(config, set_ or ())
    plan, compute = plan_evaluation(parsed), parsed.compute
    with ExitStack() as stack:
        run: Map = map
        if compute.num_gpus or compute.num_cpu_actors > 1:
            from latentcache.engine.cluster import Cluster

            cluster = Cluster(compute.num_gpus, compute.num_cpu_actors, None)
            run = stack.enter_context(cluster).map
        result = evaluate(plan, run, stack.enter_context(base.progress("evaluating")))
    lines = [*render_card(result).split("\n"), "", f"written to {result.output}"]
    base.print_result(result, lines, json_)
