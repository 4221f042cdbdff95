"""A day's work as a program: plan, run, verify. `python pipelines/day.py configs/demo.yaml`

What a scheduler would call, or a notebook: each step is one call of the public API, and an exit
code other than 0 says that the dataset is not what it should be.
"""

from __future__ import annotations

import sys

import latentcache


def main(path: str) -> int:
    config = latentcache.load_config(path)
    plan = latentcache.make_plan(config)
    print(f"{len(plan.pending)} of {len(plan.units)} units to encode into {plan.output.url}")
    for planned in plan.pending[:5]:
        print(f"  {planned.unit.source}: {planned.reason}")

    summary = latentcache.run(config, plan=plan)
    print(f"{summary.status}: {summary.num_rows} rows, {summary.num_rejects} rejects")
    for breach in summary.breaches:
        print(f"  {breach}")
    if summary.exit_code:
        return summary.exit_code

    found = latentcache.verify(summary.output, storage=plan.output.options)
    for problem in found.problems:
        print(f"  {problem.path}: {problem.message}")
    print(f"verified {found.num_files} files: {'ok' if found.ok else 'not ok'}")
    return 0 if found.ok else 3


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:2] or ["configs/demo.yaml"]))
    except latentcache.LatentCacheError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
