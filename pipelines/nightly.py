"""A nightly pipeline for a scheduler: plan, run, verify, check the QA gates, publish.

`python pipelines/nightly.py config.yaml` prints one line of JSON last. Its exit status is that of
the command line. The `published` pointer, which training reads, moves only to a manifest that is
complete, whose gates (reject budget, QA) have passed, and whose objects all exist. Nothing is
written if nothing is new. After an interruption or an error, run it again.
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
    """Run the pipeline with the config at `path`; return the result to print."""
    config = latentcache.load_config(path)
    plan = latentcache.make_plan(config)
    options = plan.output.options

    summary = latentcache.run(config, plan=plan)
    result = asdict(summary) | {"published": published(summary.output, options)}
    # There is nothing to publish after a failure, after a skipped run, or without a new manifest.
    if summary.exit_code or summary.status != "complete" or summary.manifest == result["published"]:
        return result

    report = latentcache.verify(summary.output, summary.manifest, storage=options, quick=True)
    if not report.ok:
        problems = [f"{problem.path}: {problem.message}" for problem in report.problems]
        return result | {"status": "failed_verification", "exit_code": 3, "problems": problems}

    assert summary.manifest
    latentcache.publish(summary.output, summary.manifest, storage=options)
    return result | {"published": summary.manifest}


def published(url: str, options: latentcache.StorageOptions) -> int | None:
    """Return the number of the published manifest; None if there is none."""
    try:
        return latentcache.open_dataset(url, "published", storage=options).manifest.number
    except DatasetError:
        return None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Encode what is new, check it, publish it.")
    parser.add_argument("config", help="the config, a YAML file")
    try:
        result = main(parser.parse_args().config)
    except latentcache.LatentCacheError as error:
        result = {"status": "error", "error": str(error), "exit_code": error.exit_code}
    print(json.dumps(result, ensure_ascii=False), flush=True)
    sys.exit(result["exit_code"])
