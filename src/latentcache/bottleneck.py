"""Find the slowest stage of a run, from times in receipts or live times of actors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

# In the order in which a sample passes through them.
STAGES = ("fetch", "decode", "encode", "write", "qa", "upload")

_TEXT = {
    "fetch": "reading the source; more actors read more shards in parallel",
    "encode": "encoder (expected)",
    "write": "writing to the local disk (TMPDIR)",
    "qa": "QA; lower qa.fraction",
    "upload": "writing to the output; more actors write more files in parallel",
}

# Below this much work of all stages in a run, the largest times are those of starting up.
_MIN_BUSY_S = 10.0


@dataclass(slots=True)
class StageLoad:
    """The load of one stage, over any number of units and actors.

    `alone_s` is the time that its threads would need if they never waited for other stages.
    """

    busy_s: float = 0.0
    wait_s: float = 0.0
    alone_s: float = 0.0

    @property
    def num_threads(self) -> int:
        """The number of threads of the stage in each actor."""
        return round(self.busy_s / self.alone_s) if self.alone_s else 1


@dataclass(slots=True)
class PipelineLoad:
    """The loads of all stages, summed over receipts."""

    stages: dict[str, StageLoad] = field(default_factory=dict)

    def add(self, stage: str, busy_s: float, wait_s: float, num_threads: float) -> None:
        """Add work of a stage.

        Args:
            stage, busy_s, wait_s, num_threads: both times are in seconds, summed over the threads.
        """
        load = self.stages.setdefault(stage, StageLoad())
        load.busy_s += busy_s
        load.wait_s += wait_s
        load.alone_s += busy_s / num_threads

    def add_receipt(self, stages: Mapping[str, Mapping[str, float]] | None) -> None:
        """Add the stages of a receipt; a stage without a number of threads is ignored."""
        for stage, times in (stages or {}).items():
            if "num_threads" in times:
                self.add(stage, times["busy_s"], times["wait_s"], times["num_threads"])

    @property
    def bottleneck_text(self) -> str | None:
        """Sentence on the bottleneck of a run; None if all stages worked less than 10 s in all."""
        busy_s = sum(load.busy_s for load in self.stages.values())
        return str(self.bottleneck) if self.bottleneck and busy_s >= _MIN_BUSY_S else None

    @property
    def bottleneck(self) -> Bottleneck | None:
        """The stage that takes longest with its threads; None if there was no work.

        QA and the encoder share one thread, so their times are added.
        """
        alone_s = {stage: load.alone_s for stage, load in self.stages.items() if load.alone_s}
        if not alone_s:
            return None
        sharing = {stage: alone_s.pop(stage) for stage in ("encode", "qa") if stage in alone_s}
        if sharing:
            alone_s[max(sharing, key=lambda stage: sharing[stage])] = sum(sharing.values())
        # If another stage is equally slow, more decode threads would not help.
        slowest = max(alone_s, key=lambda stage: (alone_s[stage], stage != "decode"))
        if slowest != "decode":
            return Bottleneck(slowest, alone_s[slowest])
        # With this many threads, decoding would not be slower than the next slowest stage.
        decode = self.stages["decode"]
        next_s = max((time for stage, time in alone_s.items() if stage != "decode"), default=0.0)
        num_threads = math.ceil(decode.busy_s / next_s) if next_s else decode.num_threads + 1
        return Bottleneck("decode", decode.alone_s, decode.num_threads, num_threads)


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """The slowest stage of a run.

    Only decoding has numbers of threads: `num_threads_needed` of them, in each actor, would make
    another stage the slowest.
    """

    stage: str
    alone_s: float
    num_threads: int = 0
    num_threads_needed: int = 0

    def __str__(self) -> str:
        if self.stage != "decode":
            return f"bottleneck: {_TEXT.get(self.stage, self.stage)}"
        num_more = max(1, self.num_threads_needed - self.num_threads)
        threads = "1 thread" if num_more == 1 else f"{num_more} threads"
        total = self.num_threads + num_more
        return (
            f"bottleneck: decoding; add {threads} to each actor (compute.decode_threads: {total})"
        )
