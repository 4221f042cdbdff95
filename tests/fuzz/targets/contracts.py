"""`contract.json`: a contract that gives back its text, or a `DatasetError`."""

from __future__ import annotations

from pathlib import Path

from fuzz import Target
from latentcache.dataset.contract import Contract, require_contract
from latentcache.errors import DatasetError
from latentcache.storage import Store
from tiny import mutate_json, write_tiny

_KINDS = [
    {"format": "parquet"},
    {"format": "safetensors", "posterior": "moments"},
    {"format": "parquet", "dtype": "int8"},
]


def _seeds(folder: Path) -> list[bytes]:
    outputs = [write_tiny(folder / str(i), **kind) for i, kind in enumerate(_KINDS)]
    return [(output / "contract.json").read_bytes() for output in outputs]


def _check(data: bytes, folder: Path) -> str:
    (folder / "contract.json").write_bytes(data)
    try:
        contract = require_contract(Store(str(folder)))
    except DatasetError as error:
        if "contract.json" not in str(error):
            raise
        return "DatasetError"
    assert Contract.from_json(contract.to_json()).fingerprint == contract.fingerprint
    for bucket in contract.transform.buckets:
        assert min(contract.latent_shape(bucket)) > 0
    return "contract"


TARGET = Target(_seeds, _check, max_growth_mib=60, mutate=mutate_json)
