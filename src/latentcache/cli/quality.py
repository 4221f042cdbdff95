"""Commands that measure quality: `qa`, `eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latentcache.cli.base import (
    ConfigPath,
    Json,
    ManifestNumber,
    Overrides,
    Target,
    app,
    command,
    complain,
    is_config,
    load,
    locate,
    print_json,
    print_line,
    print_text,
    progress_bar,
)


@app.command("qa")
@command
def qa_command(
    target: Target,
    set_: Overrides = None,
    manifest: ManifestNumber = None,
    num_rows: Annotated[
        int, typer.Option("--rows", min=1, help="Number of rows to check, over all buckets.")
    ] = 256,
    num_units: Annotated[
        int,
        typer.Option(
            "--units",
            min=0,
            help="Number of source shards to read again. 0 uses the crops that the run kept.",
        ),
    ] = 0,
    source: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL",
            help="Shards, a glob or a folder that --units may read. It is required with the URL of "
            "a dataset, whose own URLs are not opened. Repeatable.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed that chooses the rows.")] = 0,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint of the dataset's VAE. Default: the config's, `demo`, or the decoder."
        ),
    ] = None,
    decoder: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint whose decoder is used. Default: the VAE's. The URL of a dataset needs "
            "this or --checkpoint, unless the demo VAE encoded the dataset."
        ),
    ] = None,
    min_psnr_db: Annotated[
        float | None,
        typer.Option(help="Fail if the mean PSNR is below this, in dB.", show_default="15"),
    ] = None,
    min_drift_db: Annotated[
        float | None,
        typer.Option(
            help="Fail if a latent's signal-to-noise ratio to an fp32 encode is below this, in dB.",
            show_default="30",
        ),
    ] = None,
    max_rejects: Annotated[
        int | None,
        typer.Option(help="Fail if there are more rejects than this.", show_default="any"),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write the report to this .html or .json file.")
    ] = None,
    json_: Json = False,
) -> int:
    """Decode stored latents and compare them with their images. Exits 3 if a gate fails.

    The section `qa` of a config has the decoder and the gates. Options override it.
    """
    import tempfile

    from latentcache.config import Qa
    from latentcache.dataset.reader import open_dataset
    from latentcache.images.moved import NOT_MOVED, moved_of
    from latentcache.qa.access import source_urls
    from latentcache.qa.evaluator import QaModels
    from latentcache.qa.gates import Gates
    from latentcache.qa.reevaluate import Selection, reevaluate
    from latentcache.qa.report import build_report, require_writable
    from latentcache.storage_options import StorageOptions

    url, options = locate(target, set_)
    config = load(Path(target), set_) if is_config(target) else None
    qa = config.qa if config and config.qa else Qa()
    gates = Gates(
        qa.min_psnr_db if min_psnr_db is None else min_psnr_db,
        qa.min_drift_db if min_drift_db is None else min_drift_db,
        qa.max_rejects if max_rejects is None else max_rejects,
    )
    models = QaModels(
        decoder=decoder or qa.decoder,
        lpips=(qa.lpips.url, qa.lpips.sha256) if qa.lpips else None,
        decoder_storage=qa.storage,
        lpips_storage=qa.storage,
    )
    selection = Selection(
        num_rows=num_rows,
        num_units=num_units,
        seed=seed,
        sources=(*(source_urls(config.source) if config else ()), *(source or ())),
        source_storage=config.source.storage if config else StorageOptions(),
        moved=moved_of(config.source) if config else NOT_MOVED,
    )
    if report:
        require_writable(report)
    dataset = open_dataset(url, manifest, storage=options)
    with tempfile.TemporaryDirectory(prefix="latentcache-") as folder:
        with progress_bar() as bar:
            task = bar.add_task("decoding", total=num_rows)
            result = reevaluate(
                dataset,
                models,
                selection,
                gates,
                Path(folder),
                checkpoint=checkpoint or (config.vae.checkpoint if config else None),
                checkpoint_storage=config.vae.storage if config else StorageOptions(),
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        found = build_report(
            dataset,
            result.breaches,
            gates,
            notes=result.notes,
            decoder=result.decoder,
            files=result.files,
        )
        if report:
            found.save(report)
    for note in result.notes:
        complain(note)
    for breach in result.breaches:
        complain(f"QA: {breach}")
    if json_:
        print_json(found.tree)
    else:
        print_text(found.to_text())
    return 3 if result.breaches else 0


@app.command("eval")
@command
def eval_command(config: ConfigPath, set_: Overrides = None, json_: Json = False) -> None:
    """Compare decoders on your images: print the table of the sd-vae-ft-mse model card."""
    from contextlib import ExitStack
    from dataclasses import asdict

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
        bar = progress_bar()
        task = stack.enter_context(bar).add_task("evaluating", total=None)
        found = evaluate(
            plan, run, lambda done, total: bar.update(task, completed=done, total=total)
        )
    if json_:
        print_json(asdict(found))
    else:
        print_text(f"{render_card(found)}\n")
        print_line(f"written to {found.output}")
