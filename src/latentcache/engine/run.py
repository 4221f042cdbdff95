"""The driver: plan, establish the contract, hand out units, put receipts, write manifests.

Everything that makes work visible happens here, in one process: an actor can upload files, but
only the driver puts the receipt that makes them count.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from types import FrameType

from latentcache import __version__
from latentcache.config import Config
from latentcache.dataset.bottleneck import Loads
from latentcache.dataset.contract import (
    CONTRACT_PATH,
    Contract,
    establish_contract,
    read_contract,
    require_same,
)
from latentcache.dataset.manifest import Manifest
from latentcache.dataset.qa import Gates, QaTotals
from latentcache.dataset.receipts import Receipt, UnitSummary, put_failure
from latentcache.dataset.shards import bucket_name
from latentcache.dataset.state import Listing, State, write_next
from latentcache.engine.cluster import Cluster
from latentcache.engine.commit import Committed, Committer
from latentcache.engine.dispatcher import Dispatcher, Failed, Finished, StopSignal
from latentcache.engine.job import make_job
from latentcache.engine.lease import Lease
from latentcache.engine.plan import (
    Plan,
    PlannedUnit,
    make_plan,
    units_of,
)
from latentcache.engine.progress import RunProgress
from latentcache.engine.worker import settle_contract
from latentcache.errors import ContractMismatch, SourceError
from latentcache.images.source import list_shards
from latentcache.storage import Store, storage_options
from latentcache.vae.weights import absolute_url

# A manifest now and then during a run, so that a resume reads few receipts one by one.
MANIFEST_EVERY_UNITS = 1000
MANIFEST_EVERY_S = 600.0

# The reject rate of fewer samples than this says nothing.
MIN_SAMPLES_TO_JUDGE = 1000

# Kubernetes kills 30 s after SIGTERM: units in hand get this long, manifests the rest.
GRACE_S = 20.0


@dataclass(slots=True)
class RunSummary:
    """How a run ended; `num_rows` and `num_rejects` are of the whole dataset after it.

    `status`: `complete`, `incomplete` (units failed), `interrupted`, `too_many_rejects`, or
    `failed_qa`, for which `breaches` says why. `num_committed` units were committed by this run,
    `num_skipped` were there already. `num_qa_rows` rows were looked at, at a mean PSNR of
    `mean_psnr_db`. `bottleneck` is the stage that held this run up, and what would help.
    """

    status: str
    num_units: int
    num_committed: int
    num_skipped: int
    num_rows: int
    num_rejects: int
    manifest: int | None
    elapsed_s: float
    exit_code: int
    output: str
    num_qa_rows: int = 0
    mean_psnr_db: float | None = None
    bottleneck: str | None = None
    breaches: list[str] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)


def run(
    config: Config, *, retry_rejects: bool = False, quiet: bool = False, plan: Plan | None = None
) -> RunSummary:
    """Encode what is left to do. Run it again after anything: it takes up where it stopped.

    Args:
        config: the run.
        retry_rejects: encode units with rejects again.
        quiet: no progress on stderr.
        plan: from `make_plan`; None makes it.

    Raises:
        ContractMismatch: the output holds latents made another way.
        LatentCacheError: nothing could be started, or no unit can succeed any more.
    """
    began = time.monotonic()
    plan = plan or make_plan(config, retry_rejects=retry_rejects)
    if plan.there:
        require_same(plan.output, plan.there, plan.contract)
    driver = _Driver(config, plan, StopSignal())
    with RunProgress(len(plan.pending), quiet=quiet) as progress:
        if plan.pending:
            driver.encode(progress)
        manifest = driver.write_manifest()
    return driver.summary(manifest, time.monotonic() - began)


def gates_of(config: Config) -> Gates:
    """Read the QA gates off a config; one without `qa` has none."""
    qa = config.qa
    return Gates(qa.min_psnr_db, qa.min_drift_db, qa.max_rejects) if qa else Gates()


class _Driver:
    """The state of one run, and what it does to the output."""

    def __init__(self, config: Config, plan: Plan, stop: StopSignal) -> None:
        self.config = config
        self.output: Store = plan.output
        self.contract: Contract = plan.contract
        self.shards = plan.shards
        self.pending: list[PlannedUnit] = plan.pending
        self.left = {planned.unit.id for planned in plan.pending}
        self.listing: Listing = plan.listing
        self.state: State = plan.state
        self.stop = stop
        self.num_skipped = len(plan.units) - len(plan.pending)
        self.num_committed = 0
        self.failed: dict[str, str] = {}
        self.replans: Counter[str] = Counter()
        done = [unit for planned in plan.units if (unit := self.state.current(planned.id))]
        self.num_samples = sum(unit.num_samples for unit in done)
        self.num_rejects = sum(unit.num_rejects for unit in done)
        self.qa_totals = QaTotals(gates_of(config), done)
        self.loads = Loads()
        self._has_said_agreement = False
        self._manifest_at = (0, time.monotonic())

    def encode(self, progress: RunProgress) -> None:
        """Encode all pending units, or as many as there is time for."""
        compute = self.config.compute
        threads = None if compute.decode_threads == "auto" else compute.decode_threads
        with (
            Cluster(compute.num_gpus, compute.num_cpu_actors, threads) as cluster,
            Lease(self.output, len(self.pending)) as lease,
            Committer(self.output) as committer,
        ):
            self._establish_contract(cluster, progress)
            if not self.output.is_conditional:
                progress.say(
                    f"{self.output.url} has no conditional writes: one run at a time, by lease"
                )
                lease.require_alone()
            with self._signals(progress):
                self._check(progress)
                dispatcher = Dispatcher(
                    cluster,
                    make_job(self.config, self.contract, cluster.num_cpus_per_actor),
                    self.pending,
                    compute.unit_retries,
                    self.stop,
                )
                dispatcher.qa_wanted = self._qa_wanted()
                for event in dispatcher.run():
                    lease.num_committed = self.num_committed
                    lease.renew()
                    if isinstance(event, Finished):
                        committer.put(event.receipt)
                    elif isinstance(event, Failed):
                        self._give_up(event, dispatcher, progress)
                    else:
                        progress.polled(event.stats, event.num_lost)
                    for committed in committer.ended():
                        self._take(committed, progress)
                        dispatcher.qa_wanted = self._qa_wanted()
                for committed in committer.drain():
                    self._take(committed, progress)
            self.write_manifest()  # under the lease, on which some stores rely

    def _qa_wanted(self) -> dict[str, int]:
        """Count the QA rows that each bucket is still short of."""
        if not self.config.qa:
            return {}
        least = self.config.qa.min_rows_per_bucket
        names = [bucket_name(size) for size in self.contract.transform.buckets]
        missing = {name: least - self.qa_totals.num_rows[name] for name in names}
        return {name: num for name, num in missing.items() if num > 0}

    def _establish_contract(self, cluster: Cluster, progress: RunProgress) -> None:
        wanted = self.contract
        if not wanted.is_settled:
            if quantization := wanted.latents.quantization:
                progress.say(f"calibrating int8 on {quantization.num_images} images")
            job = make_job(self.config, self.contract, cluster.num_cpus_per_actor)
            self._adopt(cluster.ask(settle_contract, job, self.shards))
        provenance = {
            "name": self.config.name,
            "checkpoint": absolute_url(self.config.vae.checkpoint),
            # Of the package itself not what is installed: it may have come with a Ray job.
            "versions": {"latentcache": __version__}
            | {name: version(name) for name in ("torch", "pillow", "ray")},
        }
        try:
            data = establish_contract(self.output, self.contract, provenance)
        except ContractMismatch:
            there = read_contract(self.output)
            if there is None:
                raise
            # Another driver was first; what the config leaves open is as that one found it.
            adopted = wanted.settled_as(there)
            require_same(self.output, there, adopted)
            self._adopt(adopted)
            data = establish_contract(self.output, self.contract, provenance)
        self.output.probe_conditional(CONTRACT_PATH, data)

    def _adopt(self, contract: Contract) -> None:
        """Take a contract that is settled; the units get their names from it."""
        self.contract = contract
        units = units_of(self.shards, contract)
        self.listing = {unit.source: [unit] for unit in units}
        self.pending = [PlannedUnit(unit, 0, "new") for unit in units]
        self.left = {unit.id for unit in units}

    @contextmanager
    def _signals(self, progress: RunProgress) -> Iterator[None]:
        """Turn SIGINT and SIGTERM into a wish to end; Ray sets its own handlers before."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: FrameType | None) -> None:
            again = self.stop.reason is not None
            self.stop.request("interrupted", grace_s=0.0 if again else GRACE_S)
            if not again:
                progress.say(
                    f"stopping: units in hand get {GRACE_S:.0f} s to finish; "
                    "interrupt again to stop at once"
                )

        previous = {
            number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _take(self, committed: Committed, progress: RunProgress) -> None:
        """Count a unit whose receipt has been put: its rows exist."""
        receipt = committed.receipt
        if committed.is_ours:
            self.num_committed += 1
            self.loads.add_receipt(receipt.stages)
        else:
            self.num_skipped += 1
        record, before = receipt.record, self.state.current(receipt.record.unit.id)
        self.state.add(receipt)
        if receipt.state == "rows":  # the other may have been a repair, which leaves it to be done
            self.left.discard(record.unit.id)
        self.num_samples += record.num_samples - (before.num_samples if before else 0)
        self.num_rejects += record.num_rejects - (before.num_rejects if before else 0)
        self.qa_totals.add(UnitSummary.of(record), before)
        self._say_agreement(receipt, progress)
        progress.unit_done(record.num_rows, record.num_rejects)
        self._check(progress)
        num_units, since = self._manifest_at
        if (
            self.num_committed - num_units >= MANIFEST_EVERY_UNITS
            or time.monotonic() - since >= MANIFEST_EVERY_S
        ):
            self.write_manifest()
            self._manifest_at = (self.num_committed, time.monotonic())

    def _say_agreement(self, receipt: Receipt, progress: RunProgress) -> None:
        agreement_db = (receipt.notes or {}).get("decoder_agreement_db")
        if agreement_db is not None and not self._has_said_agreement:
            self._has_said_agreement = True
            progress.say(
                "qa.decoder belongs to another encoder than vae.checkpoint; on the QA images the "
                f"two agree to {agreement_db} dB, which is accepted"
            )

    def _give_up(self, event: Failed, dispatcher: Dispatcher, progress: RunProgress) -> None:
        """Plan a changed source anew, or quarantine the unit and go on."""
        unit, message = event.task.unit, event.message
        self.replans[unit.source] += 1
        if event.changed and self.replans[unit.source] <= self.config.compute.unit_retries:
            try:
                shards = list_shards(unit.source, storage_options(self.config.source.storage))
            except SourceError as error:
                message = str(error)
            else:
                (fresh,) = units_of(shards, self.contract)
                self.listing = {**self.listing, fresh.source: [fresh]}
                self.left.discard(unit.id)
                self.left.add(fresh.id)
                dispatcher.add(PlannedUnit(fresh, 0, "changed"))
                progress.say(f"{unit.source} changed while it was read: encoding its new version")
                return
        self.failed[unit.source] = message
        progress.say(f"given up: {message}")
        put_failure(self.output, unit, event.task.attempt, message)

    @property
    def _has_too_many_rejects(self) -> bool:
        limit = self.config.rejects.max_rate * self.num_samples
        return self.num_samples >= MIN_SAMPLES_TO_JUDGE and self.num_rejects > limit

    def _check(self, progress: RunProgress) -> None:
        """Stop pulling where going on would only make more of what is wrong."""
        if self.stop.reason:
            return
        for breach in self.qa_totals.breaches(at_work=True):
            progress.say(f"stopping: {breach}")
            self.stop.request("failed_qa")
        if self._has_too_many_rejects:
            rate = self.num_rejects / self.num_samples
            progress.say(
                f"stopping: {rate:.1%} of {self.num_samples} samples were rejected, more than "
                f"rejects.max_rate {self.config.rejects.max_rate:.1%}"
            )
            self.stop.request("too_many_rejects")

    def write_manifest(self) -> Manifest | None:
        """Write the next manifest, if it would differ from the newest."""
        listings = self._listings()
        self.state, manifest = write_next(
            self.state,
            self.contract.fingerprint,
            self.contract.stored_channels,
            lambda: next(listings),
            on_missing=self.config.source.on_missing,
            may_complete=not self._has_too_many_rejects and not self.qa_totals.breaches(),
        )
        return manifest

    def _listings(self) -> Iterator[Listing]:
        """Give the listing that the run works on, and after a lost race a new one each time."""
        yield self.listing
        while True:
            source = self.config.source
            shards = list_shards(source.shards, storage_options(source.storage))
            yield {unit.source: [unit] for unit in units_of(shards, self.contract)}

    def summary(self, manifest: Manifest | None, elapsed_s: float) -> RunSummary:
        """Say how it ended."""
        units = [unit for units in self.listing.values() for unit in units]
        breaches = self.qa_totals.breaches(at_work=bool(self.left))
        if self._has_too_many_rejects:
            status, exit_code = "too_many_rejects", 3
        elif breaches:
            status, exit_code = "failed_qa", 3
        elif not self.left:
            status, exit_code = "complete", 0
        else:
            status, exit_code = self.stop.reason or "incomplete", 1
        return RunSummary(
            status=status,
            num_units=len(units),
            num_committed=self.num_committed,
            num_skipped=self.num_skipped,
            num_rows=manifest.num_rows if manifest else 0,
            num_rejects=manifest.num_rejects if manifest else 0,
            manifest=manifest.number if manifest else None,
            elapsed_s=round(elapsed_s, 3),
            exit_code=exit_code,
            output=self.output.url,
            num_qa_rows=self.qa_totals.num_rows.total(),
            mean_psnr_db=self.qa_totals.mean_psnr_db,
            bottleneck=str(found) if (found := self.loads.bottleneck) else None,
            breaches=breaches,
            failed=[{"source": s, "message": m} for s, m in sorted(self.failed.items())],
        )
