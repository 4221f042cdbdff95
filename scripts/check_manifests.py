"""Validate infra/kuberay/ with KubeRay's schemas: `python scripts/check_manifests.py SCHEMAS`.

SCHEMAS is a folder of `…-rayjobs.v1.json` and `…-raycronjobs.v1.json`, the OpenAPI v3 schemas of
these resources, which are not part of this project. A field that a schema does not know is an
error, as for `kubectl create`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

MANIFESTS = Path(__file__).parents[1] / "infra" / "kuberay"


def main(folder: Path) -> int:
    num_problems = 0
    for path in sorted(MANIFESTS.glob("*.yaml")):
        for tree in yaml.safe_load_all(path.read_text()):
            if not tree.get("apiVersion", "").startswith("ray.io/"):
                continue
            name = f"*-{tree['kind'].lower()}s.v1.json"
            schema = next(folder.glob(name), None)
            if schema is None:
                sys.exit(f"{path.name}: {folder} has no {name}")
            problems = list(problems_of(tree, json.loads(schema.read_text())))
            num_problems += len(problems)
            for problem in problems:
                print(f"{path.name}: {problem}")
            print(f"{path.name}: {tree['kind']}, {len(problems)} problems ({schema.name})")
    return 1 if num_problems else 0


def problems_of(tree: Any, schema: Any) -> Iterator[str]:
    _forbid_others(schema)
    for error in Draft202012Validator(schema).iter_errors(tree):
        yield f"{error.json_path}: {error.message}"


def _forbid_others(schema: Any) -> None:
    """Make every object with named fields refuse other fields."""
    if isinstance(schema, list):
        for child in schema:
            _forbid_others(child)
    if not isinstance(schema, dict):
        return
    for child in schema.values():
        _forbid_others(child)
    is_open = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and "type" in schema and not is_open:
        schema["additionalProperties"] = False


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("schemas", type=Path)
    sys.exit(main(parser.parse_args().schemas))
