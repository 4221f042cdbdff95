"""What looking costs: a run with `qa:` against the same run without, and the QA stage's own time.

`make bench`, or `python bench/qa.py [--images 4096] [--rounds 3]`. The same drawn shards are
encoded with the demo VAE on one CPU thread, in this process, with and without QA in turns; prints
the ratio of the wall times and the share of QA in them, and writes bench/results/qa.json. The
ratios are what to quote; the times are this machine's.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from harness import write_results
from latentcache.dataset.receipts import Receipt, new_attempt
from latentcache.demo.demo_data import write_demo_data
from latentcache.engine.job import UnitTask
from local_runner import make_runner

NUM_SHARDS = 4
FRACTION = 0.001
MIN_ROWS_PER_BUCKET = 8


def run(folder: Path, *, with_qa: bool) -> dict[str, float]:
    """Encode all shards once; gives seconds in all, those of QA, and the rows that it saw."""
    began = time.perf_counter()
    qa = {"qa": {"fraction": FRACTION}} if with_qa else {}
    output = folder / ("with" if with_qa else "without")
    plan, runner = make_runner(folder / "shards", output, 1, **qa)
    seen = {"qa_s": 0.0, "num_rows": 0.0, "num_qa_rows": 0.0}
    min_rows = {"256x256": MIN_ROWS_PER_BUCKET} if with_qa else {}
    for unit in plan.units:
        receipt = runner.run(UnitTask(unit, 0, new_attempt(), min_rows))
        assert isinstance(receipt, Receipt), receipt
        assert receipt.stages
        seen["qa_s"] += receipt.stages["qa"]["busy_s"]
        seen["num_rows"] += receipt.record.num_rows
        if receipt.record.qa:
            seen["num_qa_rows"] += receipt.record.qa.file.num_rows
            min_rows = {}  # as the driver does, once a bucket has its rows
    return {"elapsed_s": time.perf_counter() - began, **seen}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pairs = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_demo_data(
            folder / "shards",
            num_shards=NUM_SHARDS,
            samples_per_shard=options.images // NUM_SHARDS,
            seed=0,
            broken=False,
        )
        for number in range(options.rounds):
            # Which goes first changes, so that a machine that slows down favours neither.
            order = (True, False) if number % 2 else (False, True)
            figures = {with_qa: run(folder, with_qa=with_qa) for with_qa in order}
            pairs.append((figures[False], figures[True]))
            print(
                f"without {figures[False]['elapsed_s']:.1f} s, "
                f"with {figures[True]['elapsed_s']:.1f} s"
            )
    ratio = statistics.median(with_["elapsed_s"] / without["elapsed_s"] for without, with_ in pairs)
    share = statistics.median(with_["qa_s"] / with_["elapsed_s"] for _, with_ in pairs)
    rows, qa_rows = int(pairs[0][1]["num_rows"]), int(pairs[0][1]["num_qa_rows"])
    print(f"{rows} rows, {qa_rows} looked at: with QA {ratio:.4f}x the time; its stage {share:.2%}")
    found_in_all = {
        "fraction": FRACTION,
        "min_rows_per_bucket": MIN_ROWS_PER_BUCKET,
        "num_rows": rows,
        "num_qa_rows": qa_rows,
        "with_over_without": round(ratio, 4),
        "qa_stage_share": round(share, 4),
        "elapsed_s": [
            [round(without["elapsed_s"], 2), round(with_["elapsed_s"], 2)]
            for without, with_ in pairs
        ],
    }
    write_results("qa", {"demo_vae": found_in_all})


if __name__ == "__main__":
    main()
