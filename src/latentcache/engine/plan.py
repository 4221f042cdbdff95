"""The plan of a run: the units of the source that have no receipt yet, each with a reason."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from latentcache.config import Config, require_kind
from latentcache.config_source import Source
from latentcache.dataset.columns import Columns, columns_of, describe_columns
from latentcache.dataset.contract import Contract, contract_diff, read_contract
from latentcache.dataset.receipts import Unit, failed_unit, list_failures, read_failures
from latentcache.dataset.state import SourceSnapshot, State, require_few
from latentcache.engine.contract_setup import requested_contract
from latentcache.errors import ConfigError, SourceError
from latentcache.images.moved import last_part, moved_of, old_folder, root_of, same_names
from latentcache.images.samples import FieldSelection, file_key_and_field
from latentcache.images.source import SourceShard, list_source
from latentcache.storage import ObjectInfo, Store

# The most known sources of the same name, such as `0.tar` in many folders, to compare a new one to.
_MAX_COMPARED = 1000


@dataclass(frozen=True, slots=True)
class PlannedUnit:
    """A unit to encode, or to rewrite with other kept columns and its stored latents.

    `generation` is that of its next receipt, and `reason` says why it is pending. `files` are those
    of a folder's slot, and `url` is the present URL of a source that moved.
    """

    unit: Unit
    generation: int
    reason: str
    files: tuple[ObjectInfo, ...] = ()
    url: str | None = None
    kind: Literal["encode", "rewrite"] = "encode"


@dataclass(frozen=True, slots=True)
class Sources:
    """Counts of listed sources compared with the newest manifest; vanished ones are not listed."""

    num_new: int
    num_changed: int
    num_unchanged: int
    num_vanished: int
    on_missing: str


@dataclass(frozen=True, slots=True)
class DuplicateSources:
    """New sources that look like known ones: `example`, for example, looks like `known`.

    `moved_from` is the setting under which all are the same; None if they did not move together.
    """

    num_duplicates: int
    num_new: int
    example: str
    known: str
    moved_from: str | None

    def to_text(self) -> str:
        """Return a message with the problem and the fix."""
        fix = (
            f"if the source moved, set source.moved_from: {self.moved_from}"
            if self.moved_from
            else "if they are the same files, name them by their old URLs"
        )
        return (
            f"{self.num_duplicates} of {self.num_new} new sources look like sources that the "
            f"output has already, such as {self.example}, which it has as {self.known}: their rows "
            f"would exist twice; {fix}"
        )


@dataclass(frozen=True)
class Plan:
    """The state of an output and the units that are pending.

    `contract` is the requested one; if it is unresolved, unit ids are provisional. `diff` are the
    fields in which it differs from the contract at the output. `units` are those of the listed
    `shards`. `on_missing` is `keep` or `drop`, for the rows of vanished sources.
    """

    output: Store
    contract: Contract
    existing_contract: Contract | None
    diff: list[str]
    shards: list[SourceShard]
    units: list[Unit]
    pending: list[PlannedUnit]
    state: State
    on_missing: str
    duplicates: DuplicateSources | None = None

    @property
    def sources(self) -> Sources:
        """Counts of new, changed, unchanged and vanished sources against the newest manifest."""
        listed, live = self.snapshot, self.state.live
        common = listed.keys() & live.keys()
        num_changed = sum(
            {unit.id for unit in listed[source]} != {unit.unit_id for unit in live[source]}
            for source in common
        )
        return Sources(
            num_new=len(listed) - len(common),
            num_changed=num_changed,
            num_unchanged=len(common) - num_changed,
            num_vanished=len(live) - len(common),
            on_missing=self.on_missing,
        )

    @property
    def snapshot(self) -> SourceSnapshot:
        """The units of each listed source."""
        return group_by_source(self.units)

    @property
    def num_images(self) -> int | None:
        """The number of image files of a folder; None for sources whose listing shows none."""
        files = [file for shard in self.shards for file in shard.files]
        is_image = FieldSelection(self.contract.source.image_fields, ()).is_image
        return sum(is_image(file_key_and_field(file.path)[1]) for file in files) if files else None

    @property
    def to_encode(self) -> list[PlannedUnit]:
        """The pending units whose images are encoded."""
        return [planned for planned in self.pending if planned.kind == "encode"]

    @property
    def to_rewrite(self) -> list[PlannedUnit]:
        """The pending units whose rows are written again with the stored latents."""
        return [planned for planned in self.pending if planned.kind == "rewrite"]

    @property
    def num_bytes_pending(self) -> int:
        """Bytes of source shards that the pending units read."""
        return sum(planned.unit.num_bytes for planned in self.pending)

    @property
    def num_bytes_rewritten(self) -> int:
        """Bytes of stored rows, latents included, that `to_rewrite` reads; queries the store."""
        units = {planned.unit.id for planned in self.to_rewrite}
        return self.state.num_stored_bytes(units) if units else 0


def make_plan(config: Config, *, retry_rejects: bool = False) -> Plan:
    """List the source, read the receipts, and return the units that are pending; write nothing.

    Args:
        config, retry_rejects: the config, and whether units with rejects are encoded again.

    Raises:
        ConfigError: the checkpoint or the source cannot be used, or the source contains the output.
        SourceError: shards are missing, or more sources than `on_missing: drop` accepts.
        StorageError: a store cannot be reached.
        DatasetError: the dataset at the output is damaged.
    """
    require_kind(config, Config)
    source, output = config.source, Store(config.output.url, config.output.storage)
    if source.folder is not None:  # each run would list the files of earlier runs
        folder = Store(source.folder, source.storage).url
        if f"{output.url}/".startswith(f"{folder}/"):
            raise ConfigError(
                f"output.url, {output.url}, is inside source.folder, whose files are read: choose "
                "a folder outside it"
            )
    contract = requested_contract(config)
    existing = read_contract(output)
    if existing:
        contract = contract.resolved_as(existing)
    state = State(output)
    try:
        shards = list_source(source, source.num_units, state.sources | state.live.keys())
    except SourceError as error:
        if not (num_units := sum(map(len, state.live.values()))):
            raise
        raise SourceError(
            f"{error}; {output.url} keeps its {num_units} units and nothing was changed, because "
            "such a listing counts as a mistake for every value of source.on_missing"
        ) from error
    units = units_of(shards, contract)
    if source.on_missing == "drop":  # fail before anything is encoded
        require_few(state.live.keys() - {unit.source for unit in units}, len(state.live))
    diff = contract_diff(existing, contract) if existing else []
    columns, pending = columns_of(source.keep), []
    reasons = _reasons(units, state, "another contract" if diff else "changed")
    for shard, unit, reason in zip(shards, units, reasons, strict=True):
        if planned := plan_unit(shard, unit, state, columns, reason, retry_rejects):
            pending.append(planned)
    return Plan(
        output=output,
        contract=contract,
        existing_contract=existing,
        diff=diff,
        shards=shards,
        units=units,
        pending=pending,
        state=state,
        on_missing=source.on_missing,
        duplicates=_find_duplicate_sources(source, shards, state, contract),
    )


def _reasons(units: Iterable[Unit], state: State, known: str) -> Iterator[str]:
    """Yield why each unit has no receipt; `known` is the reason for units of known sources."""
    sources = state.sources
    uncommitted = {unit.id for unit in units if not state.current(unit.id)}
    hints = list_failures(state.store) if uncommitted else []
    last = {failed_unit(hint.path): hint.path for hint in hints}
    paths = (path for unit, path in last.items() if unit in uncommitted)
    failures = read_failures(state.store, paths)
    for unit in units:
        if state.generation(unit.id) >= 0:
            yield "removed before: encoded again"
        elif unit.id in failures:
            yield f"failed before: {failures[unit.id]}"
        else:
            yield known if unit.source in sources else "new"


def plan_unit(
    shard: SourceShard,
    unit: Unit,
    state: State,
    columns: Columns,
    reason: str,
    retry_rejects: bool = False,
) -> PlannedUnit | None:
    """Plan what a unit needs; return None if it is committed with the requested columns.

    Args:
        shard, unit, state, columns, reason, retry_rejects: `reason` is for a unit without receipt.
    """
    committed = state.current(unit.id)
    kind: Literal["encode", "rewrite"] = "encode"
    if committed and retry_rejects and committed.num_rejects:
        reason = f"retry of {committed.num_rejects} rejects"
    elif committed:
        if committed.columns == columns:
            return None
        before, after = describe_columns(committed.columns), describe_columns(columns)
        reason, kind = f"kept columns changed: {before} -> {after}", "rewrite"
    generation = state.generation(unit.id) + 1
    return PlannedUnit(unit, generation, reason, shard.files, shard.url, kind)


def _find_duplicate_sources(
    source: Source, shards: Sequence[SourceShard], state: State, contract: Contract
) -> DuplicateSources | None:
    """Find new sources that the output has under another URL: same name, size and version.

    The version is an ETag, or the modification time of a local file, which a rename keeps. The id
    of a unit is a hash of these and of the URL. So the id that a new source would have at a known
    URL shows whether the output has it, without a further request to a store.
    """
    known, pairs = state.sources, []
    new = [shard for shard in shards if shard.source not in known]
    candidates = same_names(known) if new else {}
    for shard in new:
        for url in candidates.get(last_part(shard.source), ())[:_MAX_COMPARED]:
            identity = (shard.size_bytes, shard.version, contract.fingerprint, shard.range)
            if state.current(Unit.of(url, *identity).id):
                pairs.append((shard.url, url))
                break
    if not pairs:
        return None
    root = moved_of(source).now or root_of(source)
    return DuplicateSources(len(pairs), len(new), *pairs[0], old_folder(pairs, root))


def units_of(shards: Iterable[SourceShard], contract: Contract) -> list[Unit]:
    """Return the units of shards.

    Args:
        shards, contract: the fingerprint of the contract is part of each unit's id.
    """
    mark = contract.fingerprint
    return [Unit.of(s.source, s.size_bytes, s.version, mark, s.range) for s in shards]


def group_by_source(units: Iterable[Unit]) -> dict[str, list[Unit]]:
    """Group units by their source."""
    groups: dict[str, list[Unit]] = {}
    for unit in units:
        groups.setdefault(unit.source, []).append(unit)
    return groups
