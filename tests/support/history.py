"""A history of one output: its sources, its receipts and manifests, and the age of its files."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from latentcache import collect_unreferenced
from latentcache.dataset import state as state_module
from latentcache.dataset.contract import establish_contract
from latentcache.dataset.manifest import read_manifest, read_records
from latentcache.dataset.manifest_parts import put_part
from latentcache.dataset.receipts import (
    DataFile,
    QaFile,
    Receipt,
    Unit,
    UnitRecord,
    new_attempt,
)
from latentcache.dataset.state import State, remove_units, write_next
from latentcache.dataset.statistics import Statistics
from latentcache.engine.gc import Unreferenced
from latentcache.storage import Store
from makers import make_contract

CONTRACT = make_contract()
DAY_S = 86400.0
SOURCES = ["a.tar", "b.tar", "c.tar"]
FOLDERS = ("data", "rejects", "qa")


class World:
    """An output, the source it was made of, and what was done to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Store(str(folder))
        self.url = str(folder)
        self.listed = dict.fromkeys(SOURCES, "v1")
        self.receipts: dict[str, list[str]] = {}  # unit id -> attempt by generation
        self.late: list[State] = []  # drivers that read everything, and are slow
        establish_contract(self.store, CONTRACT, {})

    def unit(self, source: str) -> Unit:
        return Unit.of(source, 10, self.listed[source], CONTRACT.fingerprint)

    def upload(self, unit: Unit, generation: int) -> UnitRecord:
        """What an actor leaves before the driver puts its receipt."""
        attempt = new_attempt()
        stem = f"{unit.id}/{generation}-{attempt}"
        paths = [f"data/{stem}-8x8.parquet", f"rejects/{stem}.parquet", f"qa/{stem}.parquet"]
        for path in paths:
            self.store.put(path, b"some")
        buckets = ("8x8", "", "")
        data, rejects, qa = (
            DataFile(path, 4, "0" * 64, 1, bucket)
            for path, bucket in zip(paths, buckets, strict=True)
        )
        return UnitRecord(
            unit=unit,
            generation=generation,
            attempt=attempt,
            num_samples=2,
            num_rows=1,
            num_rejects=1,
            files=(data,),
            rejects=rejects,
            qa=QaFile(file=qa, num_rows={"8x8": 1}, mean_psnr_db=30.0, min_drift_db=60.0),
        )

    def commit(self, source: str) -> Receipt:
        unit = self.unit(source)
        existing = self.receipts.setdefault(unit.id, [])
        record = self.upload(unit, len(existing))
        receipt = Receipt(record, CONTRACT.fingerprint, Statistics.empty(4))
        assert self.store.put_if_absent(receipt.path, receipt.to_bytes())
        existing.append(record.attempt)
        return receipt

    def lose(self, source: str) -> None:
        """Upload an attempt at the last generation, whether or not another one is committed."""
        unit = self.unit(source)
        self.upload(unit, max(len(self.receipts.get(unit.id, ())) - 1, 0))

    def abandon(self, source: str) -> None:
        """Upload an attempt that no driver commits."""
        unit = self.unit(source)
        self.upload(unit, len(self.receipts.get(unit.id, ())))

    def repair(self, source: str) -> None:
        """`verify --repair` of the unit, if the newest manifest shows it."""
        name = f"{self.unit(source).id}-{len(self.receipts.get(self.unit(source).id, ())) - 1}"
        remove_units(self.store, {name})

    def read(self, source: str) -> None:
        """A driver reads what is there, and does nothing with it for long."""
        self.late.append(State(self.store))

    def litter(self, source: str) -> None:
        """What kills leave: a manifest part without its manifest, and half a file."""
        record = self.upload(self.unit(source), 0)
        put_part(self.store, [Receipt(record, CONTRACT.fingerprint, Statistics.empty(4))])
        for path in ("data", f"data/{record.unit.id}"):
            (self.folder / path / f".tmp-{new_attempt()}").write_bytes(b"ha")

    def change(self, source: str) -> None:
        self.listed[source] = "v2" if self.listed[source] == "v1" else "v1"

    def write(self, state: State | None = None, *, without: str = "", drop: bool = False) -> None:
        """Write the next manifest, from what a driver knows."""
        snapshot = {source: [self.unit(source)] for source in SOURCES if source != without}
        with patch.object(state_module, "MAX_MISSING_SHARE", 1.0):
            write_next(
                state or State(self.store),
                CONTRACT.fingerprint,
                4,
                lambda: snapshot,
                on_missing="drop" if drop else "keep",
            )

    def age(self) -> None:
        """Let eight days pass."""
        for path in self.folder.rglob("*"):
            if path.is_file():
                self.set_age(path)

    def set_age(self, path: Path) -> None:
        then = time.time() - 8 * DAY_S
        os.utime(path, (then, then))

    def is_old(self, path: str) -> bool:
        return (self.folder / path).stat().st_mtime < time.time() - 7 * DAY_S

    def files(self) -> set[str]:
        paths = (path for folder in FOLDERS for path in (self.folder / folder).glob("*/*"))
        return {p.relative_to(self.folder).as_posix() for p in paths if p.is_file()}

    def names_in(self, number: int) -> set[str]:
        return {r.name for r in read_records(self.store, read_manifest(self.store, number))}

    def gc(self, **options: Any) -> Unreferenced:
        return collect_unreferenced(self.url, delete=True, **options)
