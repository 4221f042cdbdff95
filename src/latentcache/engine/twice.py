"""Sources that the output has already under another URL, because their folder moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from latentcache.config_source import Source
from latentcache.dataset.contract import Contract
from latentcache.dataset.receipts import Unit
from latentcache.dataset.state import State
from latentcache.images.moved import last_part, moved_of, old_folder, root_of, same_names
from latentcache.images.source import SourceShard

# Known sources of one name that a new one is compared to, as `0.tar` in each of many folders.
_MAX_TRIED = 1000


@dataclass(frozen=True, slots=True)
class Twice:
    """New sources that look like known ones: `example` is one of them, `known` what it looks like.

    `moved_from` is the setting under which they are the same, None where they did not move
    together.
    """

    num_twice: int
    num_new: int
    example: str
    known: str
    moved_from: str | None

    def to_text(self) -> str:
        """Say what would happen, and what to do."""
        mend = (
            f"if the source moved, set source.moved_from: {self.moved_from}"
            if self.moved_from
            else "if they are the same files, name them by their old URLs"
        )
        return (
            f"{self.num_twice} of {self.num_new} new sources look like sources that the output has "
            f"already, such as {self.example}, which it has as {self.known}: their rows would be "
            f"there twice; {mend}"
        )


def find_twice(
    source: Source, shards: Sequence[SourceShard], state: State, contract: Contract
) -> Twice | None:
    """Find new sources that the output has under another URL: same name, size and version.

    The version is an ETag, or the time of change of a local file, which a rename keeps. A unit's
    name is a hash of these and of the URL. So the name that a new source would have at a known URL
    tells whether the output has it, without another look at any store.

    Returns:
        What was found; None where nothing was.
    """
    known = state.sources
    new = [shard for shard in shards if shard.source not in known]
    if not new or not known:
        return None
    candidates, mark = same_names(known), contract.fingerprint
    pairs: list[tuple[str, str]] = []
    for shard in new:
        for url in candidates.get(last_part(shard.source), ())[:_MAX_TRIED]:
            unit = Unit.of(url, shard.size_bytes, shard.version, mark, shard.range)
            if state.current(unit.id):
                pairs.append((shard.url, url))
                break
    if not pairs:
        return None
    root = moved_of(source).now or root_of(source, source.storage)
    (example, there), *_ = pairs
    return Twice(len(pairs), len(new), example, there, old_folder(pairs, root))
