"""Other commands: `bench-loader`, `schema`, `demo-data`."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from latentcache.cli import base


@base.app.command("bench-loader")
@base.command
def bench_loader_command(
    target: base.Target,
    set_: base.Overrides = None,
    manifest: base.ManifestNumber = None,
    batch_size: Annotated[int, Option(min=1, help="Rows per batch.")] = 256,
    seconds: Annotated[
        float, Option(min=0.1, help="Duration of the measurement, in seconds.")
    ] = 10.0,
    dtype: Annotated[
        str, Option(help="Data type of batches: float32, float16 or bfloat16.")
    ] = "float32",
    normalize: Annotated[
        bool, Option(help="Scale and shift latents as a model needs them.")
    ] = True,
    columns: Annotated[
        list[str] | None, Option("--column", help="Read only this column. Repeatable.")
    ] = None,
    cache_dir: Annotated[
        Path | None, Option(help="Folder that caches the files of a remote store.")
    ] = None,
    cache_bytes: Annotated[str, Option(help="Size limit of the cache.")] = "100gb",
    json_: base.Json = False,
) -> None:
    """Measure how fast `LatentLoader` reads batches on this machine, without a model."""
    from latentcache.dataset.layout import TORCH_DTYPES
    from latentcache.errors import ConfigError
    from latentcache.loader.benchmark import measure_loader
    from latentcache.loader.loader import LatentLoader

    known = {name: kind for name, kind in TORCH_DTYPES.items() if kind.is_floating_point}
    if dtype not in known:
        raise ConfigError(f"--dtype is {dtype!r}; it must be one of {', '.join(known)}")
    url, options, _ = base.locate(target, set_)
    make = functools.partial(
        LatentLoader,
        url,
        batch_size=batch_size,
        manifest=manifest,
        tail="pad",  # otherwise a small dataset has no batch
        dtype=known[dtype],
        normalize=normalize,
        columns=columns,
        cache_dir=cache_dir,
        cache_bytes=cache_bytes,
        storage=options,
    )
    with base.progress("reading", seconds) as update:
        speed = measure_loader(make, seconds, update)
    lines = [
        f"{speed.rows_per_s:,.0f} samples/s, {speed.megabytes_per_s:,.0f} MB/s of {dtype}, over "
        f"{speed.num_steps} steps in {speed.elapsed_s:.1f} s",
        f"step of {batch_size} rows: {speed.step_p50_ms:.2f} ms (median), "
        f"{speed.step_p99_ms:.2f} ms (99th percentile)",
        f"first batch after {speed.first_batch_s:.2f} s, manifest read in {speed.open_s:.2f} s; "
        f"resumed in {speed.resume_s:.2f} s",
    ]
    base.print_result(speed, lines, json_)


@base.app.command("schema")
@base.command
def schema_command(
    eval_: Annotated[
        bool, Option("--eval", help="Print the schema of a config of `eval`.")
    ] = False,
) -> None:
    """Print the JSON Schema of a config."""
    from latentcache.config import Config
    from latentcache.config_eval import EvalConfig

    text = json.dumps((EvalConfig if eval_ else Config).model_json_schema(), indent=2)
    # A description is a wrapped string of the source. Its line breaks mean nothing.
    base.print_lines(*text.replace(r"\n", " ").split("\n"))


@base.app.command("demo-data")
@base.command
def demo_data_command(
    folder: Annotated[Path, Argument(help="Folder to write the shards to.")],
    shards: Annotated[int, Option(min=1, help="Number of shards.")] = 8,
    samples: Annotated[int, Option(min=1, help="Samples per shard.")] = 24,
    seed: Annotated[int, Option(min=0, help="Random seed of the pictures.")] = 0,
    broken: Annotated[bool, Option(help="Damage some samples on purpose.")] = True,
    json_: base.Json = False,
) -> None:
    """Write WebDataset shards of drawn pictures with captions. Some samples are damaged."""
    from latentcache.demo.demo_data import write_demo_data

    made = write_demo_data(
        folder, num_shards=shards, samples_per_shard=samples, seed=seed, broken=broken
    )
    line = f"{made.num_samples} samples, {made.num_broken} of them damaged, in {folder}"
    base.print_result(made, [line], json_)
