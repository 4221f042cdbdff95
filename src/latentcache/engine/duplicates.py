"""Detection of new sources that the output has already under another URL after a move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from latentcache.config_source import Source
from latentcache.dataset.contract import Contract
from latentcache.dataset.receipts import Unit
from latentcache.dataset.state import State
from latentcache.images.moved import last_part, moved_of, old_folder, root_of, same_names
from latentcache.images.source import SourceShard

# The most known sources of the same name, such as `0.tar` in many folders, to compare a new one to.
_MAX_COMPARED = 1000


@dataclass(frozen=True, slots=True)
class DuplicateSources:
    """New sources that look like known ones: `num_duplicates` of all `num_new` ones.

    `example` is the URL of one, and `known` that of the source that it looks like. `moved_from` is
    the setting under which both are the same; None if the sources did not move together.
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


def find_duplicate_sources(
    source: Source, shards: Sequence[SourceShard], state: State, contract: Contract
) -> DuplicateSources | None:
    """Find new sources that the output has under another URL: same name, size and version.

    The version is an ETag, or the modification time of a local file, which a rename keeps. The id
    of a unit is a hash of these and of the URL. So the id that a new source would have at a known
    URL shows whether the output has it, without a further request to a store.

    Args:
        source, shards: the source of the config, and its listed shards.
        state, contract: the receipts of the output, and the contract of the run.
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
    root = moved_of(source).now or root_of(source, source.storage)
    return DuplicateSources(len(pairs), len(new), *pairs[0], old_folder(pairs, root))
