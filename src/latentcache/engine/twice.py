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
_MAX_TRIED = 1000


@dataclass(frozen=True, slots=True)
class Twice:
    """New sources that look like known ones.

    Attributes:
        num_twice: the number of such sources.
        num_new: the number of all new sources.
        example: the URL of one such source.
        known: the URL of the known source that `example` looks like.
        moved_from: the setting under which both are the same; None if they did not move together.
    """

    num_twice: int
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
            f"{self.num_twice} of {self.num_new} new sources look like sources that the output has "
            f"already, such as {self.example}, which it has as {self.known}: their rows would "
            f"exist twice; {fix}"
        )


def find_twice(
    source: Source, shards: Sequence[SourceShard], state: State, contract: Contract
) -> Twice | None:
    """Find new sources that the output has under another URL: same name, size and version.

    The version is an ETag, or the modification time of a local file, which a rename keeps. The id
    of a unit is a hash of these and of the URL. So the id that a new source would have at a known
    URL shows whether the output has it, without a further request to a store.

    Args:
        source: the source of the config.
        shards: the listed source shards.
        state: the receipts of the output.
        contract: the contract of the run.

    Returns:
        The sources that would exist twice; None if there are none.
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
    (example, known_url), *_ = pairs
    return Twice(len(pairs), len(new), example, known_url, old_folder(pairs, root))
