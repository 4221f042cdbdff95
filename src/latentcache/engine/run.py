"""The driver: plan, establish the contract, hand out units, put receipts, write manifests.

Everything that makes work visible happens here, in one process: an actor can upload files, but
only the driver puts the receipt that makes them count.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version

from latentcache import __version__
from latentcache.config import Config, require_kind
from latentcache.dataset.bottleneck import Loads
from latentcache.dataset.columns import columns_of
from latentcache.dataset.contract import (
    CONTRACT_PATH,
    Contract,
    establish_contract,
    read_contract,
    require_same,
)
from latentcache.dataset.manifest import Manifest
from latentcache.dataset.qa import Gates, QaTotals
from latentcache.dataset.receipts import Receipt, Unit, UnitSummary, put_failure
from latentcache.dataset.rejects import most_frequent
from latentcache.dataset.shards import bucket_name
from latentcache.dataset.state import Listing, State, write_next
from latentcache.engine.cluster import Cluster
from latentcache.engine.commit import Committed, Committer, Expired
from latentcache.engine.dispatcher import Dispatcher, Failed, Finished, Retries
from latentcache.engine.fields import FieldCheck, spread
from latentcache.engine.job import make_job
from latentcache.engine.lease import Lease, active_runs, stand_aside
from latentcache.engine.plan import (
    Plan,
    PlannedUnit,
    by_source,
    make_plan,
    rewrite_of,
    units_of,
)
from latentcache.engine.progress import RunProgress
from latentcache.engine.prometheus import RunMetrics
from latentcache.engine.stop import StopSignal, stop_on_signals
from latentcache.engine.summary import RunSummary
from latentcache.engine.waiting import Patience
from latentcache.engine.worker import settle_contract
from latentcache.errors import AccessDenied, ContractMismatch, SourceError, StorageError
from latentcache.images.moved import moved_of
from latentcache.images.samples import Wanted
from latentcache.images.source import SourceShard, list_again, list_source
from latentcache.log import Level
from latentcache.storage import Store, split_url, storage_options
from latentcache.vae.weights import absolute_url

# A manifest now and then during a run, so that a resume reads few receipts one by one.
MANIFEST_EVERY_UNITS = 1000
MANIFEST_EVERY_S = 600.0

# While a run goes on, the reject rate of fewer samples than this says nothing.
MIN_SAMPLES_TO_JUDGE = 1000

# Kubernetes kills 30 s after SIGTERM: units in hand get this long, manifests the rest.
GRACE_S = 20.0
_STOPPING = (
    f"stopping: units in hand get {GRACE_S:.0f} s to finish; interrupt again to stop at once"
)


def run(
    config: Config,
    *,
    retry_rejects: bool = False,
    quiet: bool = False,
    log_json: bool = False,
    plan: Plan | None = None,
) -> RunSummary:
    """Encode what is left to do. Run it again after anything: it takes up where it stopped.

    Args:
        config: the run.
        retry_rejects: encode units with rejects again.
        quiet: no progress on stderr.
        log_json: what stderr is told are JSON objects, one each line.
        plan: from `make_plan`; None makes it.

    Raises:
        ContractMismatch: the output holds latents made another way.
        LatentCacheError: nothing could be started, or no unit can succeed any more.
    """
    require_kind(config, Config)
    began, stop = time.monotonic(), StopSignal()
    on_busy = config.compute.on_busy
    while True:
        plan = plan or make_plan(config, retry_rejects=retry_rejects)
        if plan.there:
            require_same(plan.output, plan.there, plan.contract)
        driver = _Driver(config, plan, stop)
        if not plan.pending or on_busy == "join" or not active_runs(plan.output):
            break
        aside = RunProgress(0, quiet=quiet, log_json=log_json)
        stand_aside(plan.output, on_busy, stop, partial(aside.say, "busy"))
        if stop.reason:
            summary = driver.summary(plan.state.manifest, time.monotonic() - began)
            _log_end(aside, summary)
            return summary
        plan = None
    with RunProgress(len(plan.pending), quiet=quiet, log_json=log_json) as progress:
        progress.log(
            "run_started",
            f"{len(plan.to_encode)} of {len(plan.units)} units to encode, {len(plan.to_rewrite)} "
            f"to rewrite, into {plan.output.url}",
            dataset=config.name,
            output=plan.output.url,
            num_units=len(plan.units),
            num_pending=len(plan.pending),
        )
        if plan.twice:
            message, fields = plan.twice.to_text(), asdict(plan.twice)
            progress.say("sources_twice", message, "warning", **fields)
        if plan.pending:
            driver.encode(progress)
        manifest = driver.write_manifest(progress)
        summary = driver.summary(manifest, time.monotonic() - began)
        _log_end(progress, summary)
    return summary


def _log_end(progress: RunProgress, summary: RunSummary) -> None:
    fields = asdict(summary)
    fields["num_failed"] = len(fields.pop("failed"))  # each has been said
    level: Level = "error" if summary.exit_code else "info"
    progress.log("run_ended", f"the run ended: {summary.status}", level, **fields)


def _say_stopping(progress: RunProgress) -> None:
    progress.say("stopping", _STOPPING, "warning", reason="interrupted")


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
        self.columns = columns_of(config.source.keep)
        self.shards = plan.shards
        self.moved = moved_of(config.source)
        self.pending: list[PlannedUnit] = plan.pending
        self.left = {planned.unit.id for planned in plan.pending}
        self.listing: Listing = plan.listing
        self.state: State = plan.state
        self.stop = stop
        self.num_skipped = len(plan.units) - len(plan.pending)
        self.num_committed = self.num_rows = 0  # by this run
        self.failed: dict[str, str] = {}
        self.replans: Counter[str] = Counter()
        self.num_expired: Counter[str] = Counter()
        done = [unit for planned in plan.units if (unit := self.state.current(planned.id))]
        self.num_samples = sum(unit.num_samples for unit in done)
        self.num_rejects = sum(unit.num_rejects for unit in done)
        self.qa_totals = QaTotals(gates_of(config), done)
        wanted = Wanted(self.contract.source.image_fields, ())
        self.fields = FieldCheck(self.columns, done, wanted.is_image)
        self.loads = Loads()
        self._has_said: set[str] = set()
        self._manifest_at = (0, time.monotonic())

    def encode(self, progress: RunProgress) -> None:
        """Encode all pending units, or as many as there is time for."""
        compute = self.config.compute
        threads = None if compute.decode_threads == "auto" else compute.decode_threads
        with Lease(self.output, len(self.pending), self._num_total()) as lease:
            lease.wait_for_gc(self.stop, partial(progress.say, "waiting"))
            if self.stop.reason:
                return
            patience = Patience(
                compute.wait_for_gpus_s, partial(progress.say, "waiting"), lease.renew
            )
            with (
                Cluster(compute.num_gpus, compute.num_cpu_actors, threads, patience) as cluster,
                Committer(self.output) as committer,
            ):
                self._establish_contract(cluster, progress)
                self._join(lease, progress)
                with stop_on_signals(self.stop, GRACE_S, partial(_say_stopping, progress)):
                    self._check(progress)
                    dispatcher, metrics = self._dispatcher(cluster), RunMetrics(self.config.name)
                    self._encode_units(dispatcher, committer, lease, metrics, progress)
                    while dispatcher.has_work():  # units whose receipts were put too late
                        self._encode_units(dispatcher, committer, lease, metrics, progress)
                self.write_manifest(progress)  # under the lease, on which some stores rely

    def _dispatcher(self, cluster: Cluster) -> Dispatcher:
        """Return what hands out the pending units."""
        compute = self.config.compute
        if self.fields.is_open:
            self.pending = spread(self.pending)
        job = make_job(self.config, self.contract, cluster.num_cpus_per_actor)
        loads_late = all(planned.kind == "rewrite" for planned in self.pending)
        return Dispatcher(
            cluster,
            replace(job, loads_late=loads_late),
            self.pending,
            Retries(compute.unit_retries, compute.preemption_retries),
            self.stop,
            self._may_read,
        )

    def _encode_units(
        self,
        dispatcher: Dispatcher,
        committer: Committer,
        lease: Lease,
        metrics: RunMetrics,
        progress: RunProgress,
    ) -> None:
        """Encode the units of the dispatcher, and put their receipts."""
        dispatcher.qa_wanted = self._qa_wanted()
        for event in dispatcher.run():
            lease.num_committed = self.num_committed
            lease.renew()
            if isinstance(event, Finished):
                for finished in self.fields.offer(event):
                    committer.put(finished)
            elif isinstance(event, Failed):
                self._give_up(event, dispatcher, progress)
            else:
                progress.polled(event.stats, event.num_lost)
                metrics.update_actors(len(event.stats), event.num_lost)
                self._tell(metrics)
            for result in committer.ended():
                self._take(result, dispatcher, progress)
                dispatcher.qa_wanted = self._qa_wanted()
        if not self.stop.reason:
            self.fields.end(len(self.failed))
        if self.fields.warning:
            progress.say("no_such_field", self.fields.warning, "warning")
        for finished in self.fields.release():
            committer.put(finished)
        for result in committer.drain():
            self._take(result, dispatcher, progress)
        self._tell(metrics)

    def _num_total(self) -> int:
        """Count the units that the output will have, if all goes well."""
        gone = self.state.live.keys() - self.listing.keys()
        kept = gone if self.config.source.on_missing == "keep" else ()
        num_kept = sum(len(self.state.live[source]) for source in kept)
        return num_kept + sum(map(len, self.listing.values()))

    def _join(self, lease: Lease, progress: RunProgress) -> None:
        """Go another way than runs that are at work already; alone where that would be unsafe."""
        if not self.output.is_conditional:
            is_known = self.output.conditional == "no"
            found = (
                "has no conditional writes"
                if is_known
                else ("did not answer whether it has conditional writes (unknown)")
            )
            message = f"{self.output.url} {found}: one run at a time, by lease"
            progress.say("no_conditional_writes", message)
            lease.require_alone()
        elif others := lease.others():
            # What one has committed the other does not begin, so they share what is left.
            self.pending = random.sample(self.pending, len(self.pending))
            progress.say("joining", f"joining another run: {others[0]} (compute.on_busy)")

    def _tell(self, metrics: RunMetrics) -> None:
        num_failed = len(self.failed)
        metrics.update_units(self.num_committed, len(self.left) - num_failed, num_failed)

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
                num_images = quantization.num_images
                message = f"calibrating int8 on {num_images} images"
                progress.say("calibrating", message, num_images=num_images)
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
        self.listing = by_source(units)
        self.pending = [
            PlannedUnit(unit, 0, "new", shard.files, shard.url)
            for shard, unit in zip(self.shards, units, strict=True)
        ]
        self.left = {unit.id for unit in units}

    def _may_read(self, unit: Unit) -> bool:
        """Whether this process may read what a store refused to an actor."""
        folder, name = split_url(self.moved.location(unit.source))
        store = Store(folder, storage_options(self.config.source.storage))
        try:
            with store.open(name) as file:
                file.read(1)
        except AccessDenied:
            return False
        except StorageError:
            return True  # whatever it is, it is no lack of rights
        return True

    def _take(
        self, result: Committed | Expired, dispatcher: Dispatcher, progress: RunProgress
    ) -> None:
        """Count a unit whose receipt has been put: its rows exist. One put too late goes again."""
        if isinstance(result, Expired):
            self._encode_again(result.finished, dispatcher, progress)
            return
        receipt = result.receipt
        if result.is_ours:
            self.num_committed += 1
            self.num_rows += receipt.record.num_rows
            self.loads.add_receipt(receipt.stages)
        else:
            self.num_skipped += 1
        record, before = receipt.record, self.state.current(receipt.record.unit.id)
        self.state.add(receipt)
        # The other may have been a run with other kept columns: then it is to be done.
        if record.columns == self.columns:
            self.left.discard(record.unit.id)
        self.num_samples += record.num_samples - (before.num_samples if before else 0)
        self.num_rejects += record.num_rejects - (before.num_rejects if before else 0)
        self.qa_totals.add(UnitSummary.of(record), before)
        self._say_notes(receipt, progress)
        progress.unit_done(record.num_rows, record.num_rejects)
        self._check(progress)
        num_units, since = self._manifest_at
        if (
            self.num_committed - num_units >= MANIFEST_EVERY_UNITS
            or time.monotonic() - since >= MANIFEST_EVERY_S
        ):
            self.write_manifest(progress)
            self._manifest_at = (self.num_committed, time.monotonic())

    def _encode_again(
        self, finished: Finished, dispatcher: Dispatcher, progress: RunProgress
    ) -> None:
        """Hand a unit out again whose receipt came too late, or give it up after its retries."""
        unit = finished.unit.unit
        self.num_expired[unit.id] += 1
        message = f"{unit.title}: more than a day passed from handing it out to its receipt"
        if self.num_expired[unit.id] > self.config.compute.unit_retries:
            message = f"{message}, {self.num_expired[unit.id]} times: make smaller shards"
            self._give_up(Failed(finished.task, message), dispatcher, progress)
            return
        progress.say("unit_expired", f"{message}; encoding it again", "warning", source=unit.title)
        dispatcher.add(finished.unit)

    def _say_notes(self, receipt: Receipt, progress: RunProgress) -> None:
        """Say, once each, what receipts note of how they came to be."""
        notes: dict[str, str] = {}
        agreement_db = (receipt.notes or {}).get("decoder_agreement_db")
        if agreement_db is not None:
            notes["other_decoder"] = (
                "qa.decoder belongs to another encoder than vae.checkpoint; on the QA images the "
                f"two agree to {agreement_db} dB, which is accepted"
            )
        triton = (receipt.versions or {}).get("triton", "")
        if triton.startswith("unusable"):
            notes["no_fused_kernels"] = (
                f"a worker encodes without fused kernels, which is slower: triton is {triton}"
            )
        if (receipt.notes or {}).get("gathered_by_key"):
            notes["gathered_by_key"] = (
                f"{receipt.record.unit.title} is not grouped by key, or holds links: such tars are "
                "read three times; repack them with the files of each sample next to each other"
            )
        if receipt.extra_image_fields:
            fields = ", ".join(receipt.extra_image_fields)
            notes["extra_images"] = (
                f"samples have further images, which are counted and not encoded: {fields}"
            )
        for event in notes.keys() - self._has_said:
            self._has_said.add(event)
            progress.say(event, notes[event], "warning")

    def _give_up(self, event: Failed, dispatcher: Dispatcher, progress: RunProgress) -> None:
        """Plan a changed source anew, or quarantine the unit and go on."""
        unit, message = event.task.unit, event.message
        if unit not in self.listing[unit.source]:
            return  # another part of the source told of its change, and all was planned anew
        self.replans[unit.source] += 1
        if event.changed and self.replans[unit.source] <= self.config.compute.unit_retries:
            try:
                options = storage_options(self.config.source.storage)
                shards = list_again(unit.source, options, self.moved)
            except (SourceError, StorageError) as error:
                message = str(error)
            else:
                self._replan(unit, shards, dispatcher)
                message = f"{unit.source} changed while it was read: encoding its new version"
                progress.say("unit_changed", message, source=unit.source)
                return
        self.failed[unit.title] = message
        if event.lacks_field:
            self.fields.lacks(message)
        progress.say(
            "unit_given_up",
            f"given up: {message}",
            "error",
            unit=unit.id,
            source=unit.title,
            num_failed=len(self.failed),
        )
        put_failure(self.output, unit, event.task.attempt, message)

    def _replan(self, failed: Unit, shards: list[SourceShard], dispatcher: Dispatcher) -> None:
        """Take a source's new units for its old ones; what is there or under way stays so."""
        units = units_of(shards, self.contract)
        before = {unit.id for unit in self.listing[failed.source]}
        under_way = (self.left & before) - {failed.id}
        self.listing = {**self.listing, failed.source: units}
        self.left -= before
        for shard, unit in zip(shards, units, strict=True):
            planned = rewrite_of(shard, unit, self.state, self.columns)
            if planned is None and self.state.current(unit.id):
                continue
            self.left.add(unit.id)
            if unit.id not in under_way:
                generation = self.state.generation(unit.id) + 1
                new = PlannedUnit(unit, generation, "changed", shard.files, shard.url)
                dispatcher.add(planned or new)

    @property
    def _has_too_many_rejects(self) -> bool:
        limit = self.config.rejects.max_rate * self.num_samples
        may_judge = self.num_samples >= MIN_SAMPLES_TO_JUDGE or not self.left
        return may_judge and self.num_rejects > limit

    def _check(self, progress: RunProgress) -> None:
        """Stop pulling where going on would only make more of what is wrong."""
        if self.stop.reason:
            return
        for breach in self.qa_totals.breaches(at_work=True):
            progress.say("stopping", f"stopping: {breach}", "error", reason="failed_qa")
            self.stop.request("failed_qa")
        if self._has_too_many_rejects:
            rate = self.num_rejects / self.num_samples
            progress.say(
                "stopping",
                f"stopping: {rate:.1%} of {self.num_samples} samples were rejected, more than "
                f"rejects.max_rate {self.config.rejects.max_rate:.1%}",
                "error",
                reason="too_many_rejects",
                num_samples=self.num_samples,
                num_rejects=self.num_rejects,
            )
            self.stop.request("too_many_rejects")

    def write_manifest(self, progress: RunProgress) -> Manifest | None:
        """Write the next manifest, if it would differ from the newest."""
        before, listings = self.state.manifest, self._listings()
        self.state, manifest = write_next(
            self.state,
            self.contract.fingerprint,
            self.contract.stored_channels,
            lambda: next(listings),
            on_missing=self.config.source.on_missing,
            columns=self.columns,
            may_complete=not (
                self._has_too_many_rejects or self._has_no_rows or self.qa_totals.breaches()
            ),
        )
        if manifest and manifest is not before:
            progress.log(
                "manifest_written",
                f"manifest {manifest.number} names {manifest.num_rows} rows",
                manifest=manifest.number,
                complete=manifest.complete,
                num_rows=manifest.num_rows,
                num_rejects=manifest.num_rejects,
            )
        return manifest

    def _listings(self) -> Iterator[Listing]:
        """Give the listing that the run works on, and after a lost race a new one each time."""
        yield self.listing
        while True:
            source = self.config.source
            shards = list_source(source, source.num_units, self.listing.keys())
            yield by_source(units_of(shards, self.contract))

    def _counted(self) -> Iterator[UnitSummary]:
        """Give the units that the dataset has: those of the listing, and what stands in for them
        or is no longer listed.
        """
        for source, units in self.listing.items():
            found = [unit for u in units if (unit := self.state.current(u.id))]
            yield from found or self.state.live.get(source, ())
        if self.config.source.on_missing == "keep":
            for source in self.state.live.keys() - self.listing.keys():
                yield from self.state.live[source]

    @property
    def _has_no_rows(self) -> bool:
        """Whether all is done and there is not one row."""
        return not self.left and not any(unit.num_rows for unit in self._counted())

    def summary(self, manifest: Manifest | None, elapsed_s: float) -> RunSummary:
        """Say how it ended."""
        units = [unit for units in self.listing.values() for unit in units]
        found = [unit for u in units if (unit := self.state.current(u.id))]
        num_other_columns = sum(unit.columns != self.columns for unit in found)
        breaches = self.qa_totals.breaches(at_work=bool(self.left))
        if self.stop.reason == "skipped":
            status, exit_code = "skipped", 0
        elif self._has_no_rows:
            status, exit_code = "no_rows", 3
        elif self._has_too_many_rejects:
            status, exit_code = "too_many_rejects", 3
        elif breaches:
            status, exit_code = "failed_qa", 3
        elif not self.left and len(found) == len(units) and not num_other_columns:
            status, exit_code = "complete", 0
        else:
            status, exit_code = self.stop.reason or "incomplete", 1
        slowest = self.loads.bottleneck
        return RunSummary(
            status=status,
            num_units=len(units),
            num_committed=self.num_committed,
            num_skipped=self.num_skipped,
            num_rows=manifest.num_rows if manifest else 0,
            num_rejects=manifest.num_rejects if manifest else 0,
            manifest=manifest.number if manifest else None,
            num_images=manifest.num_images if manifest else 0,
            num_extra_images=manifest.num_extra_images if manifest else 0,
            elapsed_s=round(elapsed_s, 3),
            exit_code=exit_code,
            output=self.output.url,
            num_other_columns=num_other_columns,
            reject_reasons=most_frequent(self.output, self._counted()),
            num_qa_rows=self.qa_totals.num_rows.total(),
            mean_psnr_db=self.qa_totals.mean_psnr_db,
            bottleneck=str(slowest) if slowest and self.num_rows else None,
            breaches=breaches,
            failed=[{"source": s, "message": m} for s, m in sorted(self.failed.items())],
        )
