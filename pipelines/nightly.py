"""A night's work, as a program that a scheduler calls: plan, run, verify, QA gate, publish.

`python pipelines/nightly.py config.yaml` prints one line of JSON last and exits as the command line
does. What training reads as `published` moves only to a manifest that is complete, whose gates
(reject budget, QA) have passed, and whose objects are all there; where nothing is new, nothing is
written. Run it again after anything.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

import latentcache
from latentcache.errors import DatasetError


def main(path: str) -> dict[str, Any]:
    config = latentcache.load_config(path)
    plan = latentcache.make_plan(config)
    options = plan.output.options

    summary = latentcache.run(config, plan=plan)
    told = asdict(summary) | {"published": published(summary.output, options)}
    # After a failure, aside for another run, or without anything new, nothing is to be published.
    if summary.exit_code or summary.status != "complete" or summary.manifest == told["published"]:
        return told

    found = latentcache.verify(summary.output, summary.manifest, storage=options, quick=True)
    if not found.ok:
        problems = [f"{problem.path}: {problem.message}" for problem in found.problems]
        return told | {"status": "failed_verification", "exit_code": 3, "problems": problems}

    assert summary.manifest
    latentcache.publish(summary.output, summary.manifest, storage=options)
    return told | {"published": summary.manifest}


def published(url: str, options: latentcache.StorageOptions) -> int | None:
    """Give the number of the manifest that is published; None where none is yet."""
    try:
        return latentcache.open_dataset(url, "published", storage=options).manifest.number
    except DatasetError:
        return None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Encode what is new, check it, publish it.")
    parser.add_argument("config", help="the config, a YAML file")
    try:
        told = main(parser.parse_args().config)
    except latentcache.LatentCacheError as error:
        told = {"status": "error", "error": str(error), "exit_code": error.exit_code}
    print(json.dumps(told, ensure_ascii=False), flush=True)
    sys.exit(told["exit_code"])
