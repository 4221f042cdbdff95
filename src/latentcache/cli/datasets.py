"""Commands for existing datasets: `verify`, `inspect`, `diff`, `publish`, `gc`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentcache.cli.base import (
    Json,
    ManifestNumber,
    Overrides,
    Target,
    app,
    command,
    complain,
    is_config,
    locate,
    manifest_name,
    print_json,
    print_line,
    print_text,
    progress_bar,
)

if TYPE_CHECKING:
    from latentcache.dataset.diff import ManifestDiff
    from latentcache.dataset.reader import Dataset
    from latentcache.engine.gc import Unreferenced
    from latentcache.storage_options import StorageOptions


@app.command("verify")
@command
def verify_command(
    target: Target,
    set_: Overrides = None,
    manifest: ManifestNumber = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Check only that each file exists and has the right size."),
    ] = False,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Remove damaged units. The next run encodes them again."),
    ] = False,
    json_: Json = False,
) -> int:
    """Check every file that a manifest references.

    It checks existence, size, SHA-256, number of rows, and that latents are finite.
    """
    from dataclasses import asdict

    from latentcache.dataset.verify import verify

    url, options = locate(target, set_)
    with progress_bar() as bar:
        task = bar.add_task("verifying", total=None)
        found = verify(
            url,
            manifest,
            storage=options,
            quick=quick,
            repair=repair,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if json_:
        print_json(asdict(found))
    else:
        for problem in found.problems:
            print_line(f"{problem.path or problem.source}: {problem.message}")
        verdict = "ok" if found.ok else f"{len(found.problems)} problems"
        print_line(
            f"{verdict}: manifest {found.manifest}, {found.num_units} units, {found.num_files} "
            f"files, {found.num_rows} rows, {found.num_rejects} rejects"
        )
    if found.repaired:
        complain(f"{len(found.repaired)} units removed; run `latentcache run` to encode them again")
    elif not found.ok and not repair:
        complain(
            "`latentcache verify --repair` removes the damaged units, and the next run encodes them"
        )
    return 0 if found.ok else 3


@app.command("inspect")
@command
def inspect_command(
    target: Target,
    set_: Overrides = None,
    manifest: ManifestNumber = None,
    num_rows: Annotated[
        int | None,
        typer.Option("--rows", min=0, help="Number of rows to show. Default: 5, with --image 24."),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a picture of decoded random rows instead."),
    ] = None,
    decoder: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Checkpoint whose decoder --image uses. Default: the config's. It is required "
            "with the URL of a dataset, unless the demo VAE encoded the dataset.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of --image.")] = 0,
    json_: Json = False,
) -> None:
    """Show the contract, totals, buckets, statistics, and some rows and rejects."""
    from latentcache.dataset.inspect import describe, render
    from latentcache.dataset.reader import open_dataset
    from latentcache.errors import ConfigError

    if decoder and not image:
        raise ConfigError("--decoder needs --image")
    url, options = locate(target, set_)
    dataset = open_dataset(url, manifest, storage=options)
    if image:
        checkpoint, vae_options = _named_vae(target, set_)
        drawn = _draw_rows(dataset, image, num_rows, decoder or checkpoint, vae_options, seed)
        print_json(drawn) if json_ else print_line(f"{drawn['num_rows']} rows in {image}")
        return
    described = describe(dataset, 5 if num_rows is None else num_rows)
    if json_:
        print_json(described)
    else:
        print_text(render(described))


def _named_vae(target: str, overrides: list[str] | None) -> tuple[str | None, StorageOptions]:
    """Return the checkpoint of a config and how to reach it; None for the URL of a dataset."""
    from latentcache.config import load_config
    from latentcache.storage_options import StorageOptions

    if not is_config(target):
        return None, StorageOptions()
    vae = load_config(target, overrides or ()).vae
    return vae.checkpoint, vae.storage


def _draw_rows(
    dataset: Dataset,
    image: Path,
    num_rows: int | None,
    decoder: str | None,
    storage: StorageOptions,
    seed: int,
) -> dict[str, Any]:
    """Write a contact sheet; see `qa/sheet.py`."""
    from latentcache.errors import ConfigError
    from latentcache.qa.sheet import DEFAULT_NUM_ROWS, load_decoder, save_sheet

    if num_rows == 0:
        raise ConfigError("--image needs at least one row: raise --rows")
    vae, notes = load_decoder(dataset, decoder, storage)
    for note in notes:
        complain(note)
    with progress_bar() as bar:
        task = bar.add_task("decoding", total=None)
        num_drawn = save_sheet(
            dataset,
            vae,
            image,
            num_rows or DEFAULT_NUM_ROWS,
            seed=seed,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    return {"image": str(image), "num_rows": num_drawn, "notes": notes}


@app.command("diff")
@command
def diff_command(
    target: Target,
    before: Annotated[
        Any,
        typer.Argument(
            parser=manifest_name,
            metavar="N",
            help="First manifest: a number or `published`. Default: the complete one before M.",
            show_default=False,
        ),
    ] = None,
    after: Annotated[
        Any,
        typer.Argument(
            parser=manifest_name,
            metavar="M",
            help="Second manifest: a number or `published`. Default: the newest complete one.",
            show_default=False,
        ),
    ] = None,
    set_: Overrides = None,
    json_: Json = False,
) -> None:
    """List the units that were added, replaced or removed between two manifests."""
    from dataclasses import asdict

    from latentcache.dataset.diff import diff_manifests

    url, options = locate(target, set_)
    found = diff_manifests(url, before, after, storage=options)
    if json_:
        print_json(asdict(found))
    else:
        _print_diff(found)


def _print_diff(found: ManifestDiff, most: int = 20) -> None:
    for kind in ("added", "replaced", "removed"):
        diffs = getattr(found, kind)
        for diff in diffs[:most]:
            gone, come = (sum(u.num_rows for u in units) for units in (diff.before, diff.after))
            rows = f"{gone} -> {come}" if kind == "replaced" else f"{gone + come}"
            print_line(f"{kind:9}  {diff.source}  {rows} rows")
        if len(diffs) > most:
            print_line(f"… and {len(diffs) - most} more {kind}")
    names = ("before", "added", "replaced", "replacing", "removed", "after")
    print_line(f"{'':10}{'units':>10}{'rows':>14}{'rejects':>12}")
    for name in names:
        counts = getattr(found.counts, name)
        number = {"before": found.before, "after": found.after}.get(name)
        label = name if number is None else f"{number:08d}"
        print_line(f"{label:10}{counts.num_units:>10}{counts.num_rows:>14}{counts.num_rejects:>12}")


@app.command("publish")
@command
def publish_command(
    target: Target,
    number: Annotated[
        int | None,
        typer.Argument(
            metavar="N",
            help="Number of the manifest. Default: the newest complete one.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Allow a manifest older than the published one.")
    ] = False,
    set_: Overrides = None,
    json_: Json = False,
) -> None:
    """Publish a complete manifest: readers open it as `published`."""
    from dataclasses import asdict

    from latentcache.dataset.publish import publish

    url, options = locate(target, set_)
    published = publish(url, number, force=force, storage=options)
    if json_:
        print_json(asdict(published))
    else:
        print_line(f"published: manifest {published.manifest}, at {published.published_at}")


@app.command("gc")
@command
def gc_command(
    target: Target,
    set_: Overrides = None,
    delete: Annotated[
        bool, typer.Option("--delete", help="Delete the files. Without it, nothing is changed.")
    ] = False,
    keep_last: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="K",
            help="Keep only the K newest complete manifests, the published one, and those that "
            "readers may have opened recently. Default: keep all manifests.",
            show_default=False,
        ),
    ] = None,
    keep: Annotated[
        list[int] | None,
        typer.Option(metavar="N", help="Manifest that --keep-last keeps too. Repeatable."),
    ] = None,
    older_than_days: Annotated[
        float, typer.Option(help="Keep younger files, by the store's clock. At least 2.")
    ] = 7.0,
    json_: Json = False,
) -> None:
    """List unreferenced files (dry run); --delete removes them.

    These are files of lost attempts and superseded units, and leftovers of killed processes.
    """
    from dataclasses import asdict

    from latentcache.engine.gc import collect_unreferenced

    url, options = locate(target, set_)
    with progress_bar() as bar:
        task = bar.add_task("listing", total=None)
        listed = collect_unreferenced(
            url,
            delete=delete,
            keep_last=keep_last,
            keep=keep or (),
            older_than_days=older_than_days,
            storage=options,
            progress=lambda what, done, total: bar.update(
                task, description=what, completed=done, total=total
            ),
        )
    for note in listed.notes:
        complain(note)
    if json_:
        totals = {"num_objects": listed.num_objects, "num_bytes": listed.num_bytes}
        print_json(asdict(listed) | totals)
    else:
        _print_unreferenced(listed)


def _print_unreferenced(listed: Unreferenced) -> None:
    from latentcache.engine.gc import KINDS
    from latentcache.log import size_text

    for kind, objects in listed.objects.items():
        if objects:
            size = size_text(sum(each.size_bytes for each in objects))
            print_line(f"{len(objects):>8}  {size:>10}  {KINDS[kind]}")
    if listed.uploads:
        print_line(f"{len(listed.uploads):>8}  {'':>10}  unfinished multipart uploads")
    action = "deleted" if listed.is_deleted else "would delete"
    is_clean = not (listed.num_objects or listed.uploads)
    hint = "" if listed.is_deleted or is_clean else "; --delete removes them"
    kept = ", ".join(map(str, listed.kept[-10:]))
    more = f"{len(listed.kept) - 10} and " if len(listed.kept) > 10 else ""
    print_line(
        f"{action} {listed.num_objects} objects, {size_text(listed.num_bytes)}; kept manifests: "
        f"{more}{kept}{hint}"
    )
