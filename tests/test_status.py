"""`latentcache status` on outputs that runs of other days have left."""

from __future__ import annotations

from pathlib import Path

from latentcache.dataset.contract import establish_contract
from latentcache.dataset.receipts import Receipt, Unit, UnitRecord, new_attempt
from latentcache.dataset.state import State, write_next
from latentcache.dataset.statistics import Statistics
from latentcache.engine.status import read_status
from latentcache.storage import StorageOptions, Store
from makers import make_contract


def test_the_bottleneck_is_that_of_the_latest_units(tmp_path: Path):
    contract = make_contract()
    store = Store(str(tmp_path))
    establish_contract(store, contract, {})
    state, listing = State(store), {}
    threads = {"decode": 4, "encode": 1}
    for day, busy in enumerate(({"decode": 90.0, "encode": 1.0}, {"decode": 1.0, "encode": 9.0})):
        for number in range(70):
            unit = Unit.of(f"{day}-{number}.tar", 10, "v1", contract.fingerprint)
            record = UnitRecord(unit, 0, new_attempt(), 0, 0, 0, (), None)
            stages = {
                stage: {"busy_s": busy[stage], "wait_s": 0.0, "num_threads": threads[stage]}
                for stage in threads
            }
            receipt = Receipt(record, contract.fingerprint, Statistics.empty(4), stages=stages)
            assert store.put_if_absent(receipt.path, receipt.to_bytes())
            state.add(receipt)
            listing[unit.source] = [unit]
        seen = dict(listing)
        state, _ = write_next(
            state, contract.fingerprint, 4, lambda seen=seen: seen, on_missing="keep"
        )
    found = read_status(str(tmp_path), StorageOptions())
    assert found.num_committed == 140
    assert found.bottleneck == "encode-bound: as it should be"
