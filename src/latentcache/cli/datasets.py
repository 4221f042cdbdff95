"""Commands for existing datasets: `verify`, `inspect`, `diff`, `publish`, `gc`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from latentcache.cli import base

if TYPE_CHECKING:
    from latentcache.dataset.diff import ManifestDiff
    from latentcache.engine.gc import Unreferenced


@base.app.command("verify")
@base.command
def verify_command(
    target: base.Target,
    set_: base.Overrides = None,
    manifest: base.ManifestNumber = None,
    quick: Annotated[
        bool, Option("--quick", help="Check only that each file exists and has the right size.")
    ] = False,
    repair: Annotated[
        bool, Option("--repair", help="Remove damaged units. The next run encodes them again.")
    ] = False,
    json_: base.Json = False,
) -> int:
    """Check every file that a manifest references.

    It checks existence, size, SHA-256, number of rows, and that latents are finite.
    """
    from latentcache.dataset.verify import verify

    url, options, _ = base.locate(target, set_)
    with base.progress("verifying") as update:
        result = verify(url, manifest, storage=options, quick=quick, repair=repair, progress=update)
    verdict = "ok" if result.ok else f"{len(result.problems)} problems"
    lines = [
        *(f"{problem.path or problem.source}: {problem.message}" for problem in result.problems),
        f"{verdict}: manifest {result.manifest}, {result.num_units} units, {result.num_files} "
        f"files, {result.num_rows} rows, {result.num_rejects} rejects",
    ]
    base.print_result(result, lines, json_)
    if result.repaired:
        num_removed = len(result.repaired)
        base.complain(f"{num_removed} units removed; run `latentcache run` to encode them again")
    elif not result.ok and not repair:
        base.complain(
            "`latentcache verify --repair` removes the damaged units, and the next run encodes them"
        )
    return 0 if result.ok else 3


@base.app.command("inspect")
@base.command
def inspect_command(
    target: base.Target,
    set_: base.Overrides = None,
    manifest: base.ManifestNumber = None,
    num_rows: Annotated[
        int | None,
        Option("--rows", min=0, help="Number of rows to show. Default: 5, with --image 24."),
    ] = None,
    image: Annotated[
        Path | None, Option(metavar="FILE", help="Write a picture of decoded random rows instead.")
    ] = None,
    decoder: Annotated[
        str | None,
        Option(
            metavar="URL",
            help="Checkpoint whose decoder --image uses. Default: the config's. It is required "
            "with the URL of a dataset, unless the demo VAE encoded the dataset.",
        ),
    ] = None,
    seed: Annotated[int, Option(min=0, help="Random seed of --image.")] = 0,
    json_: base.Json = False,
) -> None:
    """Show the contract, totals, buckets, statistics, and some rows and rejects."""
    from latentcache.dataset.inspect import describe, render
    from latentcache.dataset.reader import open_dataset
    from latentcache.errors import ConfigError
    from latentcache.storage_options import StorageOptions

    if decoder and not image:
        raise ConfigError("--decoder needs --image")
    url, options, config = base.locate(target, set_)
    dataset = open_dataset(url, manifest, storage=options)
    if image is None:
        described = describe(dataset, 5 if num_rows is None else num_rows)
        base.print_result(described, [] if json_ else render(described).split("\n"), json_)
        return
    if num_rows == 0:
        raise ConfigError("--image needs at least one row: raise --rows")
    from latentcache.qa.sheet import load_decoder, save_sheet

    decoder = decoder or (config.vae.checkpoint if config else None)
    vae, notes = load_decoder(dataset, decoder, config.vae.storage if config else StorageOptions())
    for note in notes:
        base.complain(note)
    with base.progress("decoding") as update:
        num_drawn = save_sheet(dataset, vae, image, num_rows or 24, seed=seed, progress=update)
    drawn = {"image": str(image), "num_rows": num_drawn, "notes": notes}
    base.print_result(drawn, [f"{num_drawn} rows in {image}"], json_)


@base.app.command("diff")
@base.command
def diff_command(
    target: base.Target,
    before: Annotated[
        Any,
        Argument(
            parser=base.manifest_name,
            metavar="N",
            help="First manifest: a number or `published`. Default: the complete one before M.",
        ),
    ] = None,
    after: Annotated[
        Any,
        Argument(
            parser=base.manifest_name,
            metavar="M",
            help="Second manifest: a number or `published`. Default: the newest complete one.",
        ),
    ] = None,
    set_: base.Overrides = None,
    json_: base.Json = False,
) -> None:
    """List the units that were added, replaced or removed between two manifests."""
    from latentcache.dataset.diff import diff_manifests

    url, options, _ = base.locate(target, set_)
    diff = diff_manifests(url, before, after, storage=options)
    base.print_result(diff, _diff_lines(diff), json_)


def _diff_lines(diff: ManifestDiff) -> Iterator[str]:
    for kind in ("added", "replaced", "removed"):
        sources = getattr(diff, kind)
        for each in sources[: base.MAX_LINES]:
            gone, new = (sum(u.num_rows for u in units) for units in (each.before, each.after))
            rows = f"{gone} -> {new}" if kind == "replaced" else f"{gone + new}"
            yield f"{kind:9}  {each.source}  {rows} rows"
        if len(sources) > base.MAX_LINES:
            yield f"… and {len(sources) - base.MAX_LINES} more {kind}"
    yield f"{'':10}{'units':>10}{'rows':>14}{'rejects':>12}"
    numbers = {"before": diff.before, "after": diff.after}
    for name in ("before", "added", "replaced", "replacing", "removed", "after"):
        counts, number = getattr(diff.counts, name), numbers.get(name)
        label = name if number is None else f"{number:08d}"
        yield f"{label:10}{counts.num_units:>10}{counts.num_rows:>14}{counts.num_rejects:>12}"


@base.app.command("publish")
@base.command
def publish_command(
    target: base.Target,
    number: Annotated[
        int | None,
        Argument(metavar="N", help="Number of the manifest. Default: the newest complete one."),
    ] = None,
    force: Annotated[
        bool, Option("--force", help="Allow a manifest older than the published one.")
    ] = False,
    set_: base.Overrides = None,
    json_: base.Json = False,
) -> None:
    """Publish a complete manifest: readers open it as `published`."""
    from latentcache.dataset.publish import publish

    url, options, _ = base.locate(target, set_)
    published = publish(url, number, force=force, storage=options)
    line = f"published: manifest {published.manifest}, at {published.published_at}"
    base.print_result(published, [line], json_)


@base.app.command("gc")
@base.command
def gc_command(
    target: base.Target,
    set_: base.Overrides = None,
    delete: Annotated[
        bool, Option("--delete", help="Delete the files. Without it, nothing is changed.")
    ] = False,
    keep_last: Annotated[
        int | None,
        Option(
            min=1,
            metavar="K",
            help="Keep only the K newest complete manifests, the published one, and those that "
            "readers may have opened recently. Default: keep all manifests.",
        ),
    ] = None,
    keep: Annotated[
        list[int] | None,
        Option(metavar="N", help="Manifest that --keep-last keeps too. Repeatable."),
    ] = None,
    older_than_days: Annotated[
        float, Option(help="Keep younger files, by the store's clock. At least 2.")
    ] = 7.0,
    json_: base.Json = False,
) -> None:
    """List unreferenced files (dry run); --delete removes them.

    These are files of lost attempts and superseded units, and leftovers of killed processes.
    """
    from dataclasses import asdict

    from latentcache.engine.gc import collect_unreferenced

    url, options, _ = base.locate(target, set_)
    with base.progress("listing") as update:
        result = collect_unreferenced(
            url,
            delete=delete,
            keep_last=keep_last,
            keep=keep or (),
            older_than_days=older_than_days,
            storage=options,
            progress=lambda what, done, total: update(done, total, what),
        )
    for note in result.notes:
        base.complain(note)
    totals = {"num_objects": result.num_objects, "num_bytes": result.num_bytes}
    base.print_result(asdict(result) | totals, _unreferenced_lines(result), json_)


def _unreferenced_lines(result: Unreferenced) -> Iterator[str]:
    from latentcache.engine.gc import KINDS
    from latentcache.log import size_text

    for kind, objects in result.objects.items():
        if objects:
            size = size_text(sum(each.size_bytes for each in objects))
            yield f"{len(objects):>8}  {size:>10}  {KINDS[kind]}"
    if result.uploads:
        yield f"{len(result.uploads):>8}  {'':>10}  unfinished multipart uploads"
    action = "deleted" if result.is_deleted else "would delete"
    is_clean = not (result.num_objects or result.uploads)
    hint = "" if result.is_deleted or is_clean else "; --delete removes them"
    kept = ", ".join(map(str, result.kept[-10:]))
    more = f"{len(result.kept) - 10} and " if len(result.kept) > 10 else ""
    yield (
        f"{action} {result.num_objects} objects, {size_text(result.num_bytes)}; kept manifests: "
        f"{more}{kept}{hint}"
    )
