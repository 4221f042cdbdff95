"""The driver: plan, establish the contract, dispatch units, put receipts, write manifests.

Actors upload files; only the driver puts the receipts that make those files count.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial

from latentcache.config import Config, require_kind
from latentcache.dataset.contract import require_same
from latentcache.dataset.manifest import Manifest
from latentcache.dataset.receipts import Receipt, Unit, put_failure
from latentcache.engine.cluster import Cluster
from latentcache.engine.commit import Committed, Committer
from latentcache.engine.contract_setup import put_contract
from latentcache.engine.dispatcher import Dispatcher, Failed, Finished, Retries
from latentcache.engine.job import make_job
from latentcache.engine.kept_fields import FieldCheck, spread
from latentcache.engine.lease import Lease, active_runs, wait_for_other_runs
from latentcache.engine.plan import Plan, make_plan
from latentcache.engine.progress import RunProgress
from latentcache.engine.prometheus import RunMetrics
from latentcache.engine.summary import RunCounts, RunSummary
from latentcache.engine.waiting import StopSignal, WaitPolicy, stop_on_signals
from latentcache.engine.work import Work
from latentcache.engine.worker import calibrate_contract
from latentcache.errors import AccessDenied, SourceError, StorageError
from latentcache.images.moved import moved_of
from latentcache.images.samples import FieldSelection
from latentcache.images.source import relist_source
from latentcache.log import Level
from latentcache.storage import Store, split_url

# The driver writes manifests during a run, so that a resumed run reads few receipts one by one.
MANIFEST_EVERY_UNITS = 1000
MANIFEST_EVERY_S = 600.0

# Kubernetes kills a pod 30 s after SIGTERM. Units in progress get this long; the rest of the time
# is for the manifest.
GRACE_S = 20.0
_STOPPING = (
    f"stopping: units in progress get {GRACE_S:.0f} s to finish; interrupt again to stop at once"
)


def run(
    config: Config,
    *,
    retry_rejects: bool = False,
    quiet: bool = False,
    log_json: bool = False,
    plan: Plan | None = None,
) -> RunSummary:
    """Encode the units that have no receipt yet, and return how the run ended.

    After an interruption or an error, the next run continues where the last one stopped.

    Args:
        config, plan: the config of the run, and its plan; None makes one.
        retry_rejects: encode units with rejects again.
        quiet, log_json: write no progress to stderr, or write JSON objects, one per line.

    Raises:
        ContractMismatch: the output holds latents of another contract.
        LatentCacheError: the run cannot start, or an error affects all units.
    """
    require_kind(config, Config)
    began, stop, on_busy = time.monotonic(), StopSignal(), config.compute.on_busy
    while True:
        plan = plan or make_plan(config, retry_rejects=retry_rejects)
        if plan.existing_contract:
            require_same(plan.output, plan.existing_contract, plan.contract)
        progress = RunProgress(len(plan.pending), quiet=quiet, log_json=log_json)
        driver = _Driver(config, plan, stop, progress)
        if not plan.pending or on_busy == "join" or not active_runs(plan.output):
            manifest = _run_plan(driver, plan, progress)
            break
        wait_for_other_runs(plan.output, on_busy, stop, partial(progress.say, "busy"))
        if stop.reason:
            manifest = plan.state.manifest
            break
        plan = None
    summary = driver.counts.summarise(manifest, stop.reason, time.monotonic() - began)
    fields = asdict(summary)
    fields["num_failed"] = len(fields.pop("failed"))  # each has its own event
    level: Level = "error" if summary.exit_code else "info"
    progress.log("run_ended", f"the run ended: {summary.status}", level, **fields)
    return summary


def _run_plan(driver: _Driver, plan: Plan, progress: RunProgress) -> Manifest | None:
    """Encode the pending units of a plan and write the manifest; return the newest one."""
    with progress:
        progress.log(
            "run_started",
            f"{len(plan.to_encode)} of {len(plan.units)} units to encode, {len(plan.to_rewrite)} "
            f"to rewrite, into {plan.output.url}",
            dataset=driver.config.name,
            output=plan.output.url,
            num_units=len(plan.units),
            num_pending=len(plan.pending),
        )
        if plan.duplicates:
            message, fields = plan.duplicates.to_text(), asdict(plan.duplicates)
            progress.say("sources_twice", message, "warning", **fields)
        return _encode(driver, progress) if plan.pending else driver.write_manifest()


def _encode(driver: _Driver, progress: RunProgress) -> Manifest | None:
    """Encode the pending units until all are done or the run is stopped; write the manifest."""
    config, work, stop = driver.config, driver.work, driver.stop
    compute, say_waiting = config.compute, partial(progress.say, "waiting")
    say_stopping = partial(progress.say, "stopping", _STOPPING, "warning", reason="interrupted")
    threads = None if compute.decode_threads == "auto" else compute.decode_threads
    with Lease(driver.output, len(work.pending), work.num_total) as lease:
        lease.wait_for_gc(stop, say_waiting)
        if stop.reason:
            return driver.write_manifest()
        policy = WaitPolicy(compute.wait_for_gpus_s, say_waiting, lease.renew)
        with (
            Cluster(compute.num_gpus, compute.num_cpu_actors, threads, policy) as cluster,
            Committer(driver.output) as committer,
        ):
            _establish_contract(driver, cluster, progress)
            _join(driver, lease, progress)
            with stop_on_signals(stop, GRACE_S, say_stopping):
                driver.check_gates()
                if driver.fields.is_open:
                    work.pending = spread(work.pending)
                job = make_job(config, work.contract, cluster.num_cpus_per_actor)
                job = replace(job, loads_late=all(unit.kind == "rewrite" for unit in work.pending))
                retries = Retries(compute.unit_retries, compute.preemption_retries)
                dispatcher = Dispatcher(
                    cluster, job, work.pending, retries, stop, partial(_may_read, driver)
                )
                driver.encode_units(dispatcher, committer, lease)
                while dispatcher.has_work():  # units whose receipts were put too late
                    driver.encode_units(dispatcher, committer, lease)
            return driver.write_manifest()  # under the lease: some stores need it


def _establish_contract(driver: _Driver, cluster: Cluster, progress: RunProgress) -> None:
    """Measure the open values of the contract on a worker, and put the contract."""
    config, work = driver.config, driver.work
    requested = resolved = work.contract
    if not requested.is_resolved:
        if quantization := requested.latents.quantization:
            num_images = quantization.num_images
            message = f"calibrating int8 on {num_images} images"
            progress.say("calibrating", message, num_images=num_images)
        job = make_job(config, requested, cluster.num_cpus_per_actor)
        resolved = cluster.ask(calibrate_contract, job, work.shards)
    contract = put_contract(config, driver.output, requested, resolved)
    if contract != requested:
        work.adopt(contract)


def _join(driver: _Driver, lease: Lease, progress: RunProgress) -> None:
    """Use another order of units than other active runs; refuse where two runs are unsafe."""
    output, work = driver.output, driver.work
    if output.conditional != "yes":
        problem = "has no conditional writes"
        if output.conditional == "unknown":
            problem = "did not answer whether it has conditional writes (unknown)"
        message = f"{output.url} {problem}: one run at a time, by lease"
        progress.say("no_conditional_writes", message)
        lease.require_alone()
    elif others := lease.others():
        # A run skips units that another run has committed. In random order they overlap little.
        work.pending = random.sample(work.pending, len(work.pending))
        progress.say("joining", f"joining another run: {others[0]} (compute.on_busy)")


def _may_read(driver: _Driver, unit: Unit) -> bool:
    """Return whether this process may read a source that a store refused to an actor."""
    folder, name = split_url(driver.moved.location(unit.source))
    try:
        with Store(folder, driver.config.source.storage).open(name) as file:
            file.read(1)
    except AccessDenied:
        return False
    except StorageError:
        return True  # any other error does not mean missing permissions
    return True


class _Driver:
    """The loop of one run, and the only writer of receipts and manifests in it."""

    def __init__(self, config: Config, plan: Plan, stop: StopSignal, progress: RunProgress) -> None:
        self.config, self.stop = config, stop
        self.output: Store = plan.output
        self.work = Work(config, plan)
        self.counts = RunCounts(config, self.work)
        is_image = FieldSelection(plan.contract.source.image_fields, ()).is_image
        self.fields = FieldCheck(self.work.columns, self.work.committed(), is_image)
        self.moved = moved_of(config.source)
        self._progress = progress
        self._metrics = RunMetrics(config.name)
        self._num_changes: Counter[str] = Counter()  # by source
        self._num_expired: Counter[str] = Counter()  # by unit
        self._shown_notes: set[str] = set()
        self._manifest_at = (0, time.monotonic())

    def encode_units(self, dispatcher: Dispatcher, committer: Committer, lease: Lease) -> None:
        """Encode the units of the dispatcher and put their receipts.

        Args:
            dispatcher, committer, lease: of the run; the lease is renewed.
        """
        dispatcher.min_qa_rows = self.counts.missing_qa_rows()
        for event in dispatcher.run():
            lease.num_committed = self.counts.num_committed
            lease.renew()
            if isinstance(event, Finished):
                for finished in self.fields.offer(event):
                    committer.put(finished)
            elif isinstance(event, Failed):
                self._handle_failure(event, dispatcher)
            else:
                self._progress.polled(event)
                num_actors, num_lost = len(event.stats), event.num_lost
                self._metrics.update(actors=num_actors, actors_lost_total=num_lost)
                self._update_metrics()
            self._handle_puts(committer.ended(), dispatcher)
        if not self.stop.reason:
            self.fields.end(len(self.counts.failed))
        if self.fields.warning:
            self._progress.say("no_such_field", self.fields.warning, "warning")
        for finished in self.fields.release():
            committer.put(finished)
        self._handle_puts(committer.drain(), dispatcher)
        self._update_metrics()

    def _update_metrics(self) -> None:
        num_failed = len(self.counts.failed)
        self._metrics.update(
            units_committed_total=self.counts.num_committed,
            units_pending=len(self.work.remaining) - num_failed,
            units_failed=num_failed,
        )

    def _handle_puts(self, results: Iterable[Committed | Finished], dispatcher: Dispatcher) -> None:
        """Count units whose receipts were put; encode those again whose receipts came too late."""
        for result in results:
            if isinstance(result, Finished):
                self._encode_again(result, dispatcher)
                continue
            receipt = result.receipt
            self.counts.add(result)
            for event, message in _notes_of(receipt):
                if event not in self._shown_notes:
                    self._shown_notes.add(event)
                    self._progress.say(event, message, "warning")
            self._progress.add_unit(receipt.record)
            self.check_gates()
            dispatcher.min_qa_rows = self.counts.missing_qa_rows()
            num_units, since = self._manifest_at
            if (
                self.counts.num_committed - num_units >= MANIFEST_EVERY_UNITS
                or time.monotonic() - since >= MANIFEST_EVERY_S
            ):
                self.write_manifest()
                self._manifest_at = (self.counts.num_committed, time.monotonic())

    def _encode_again(self, finished: Finished, dispatcher: Dispatcher) -> None:
        """Dispatch again a unit whose receipt came too late, or fail it after its retries."""
        unit = finished.unit.unit
        self._num_expired[unit.id] += 1
        message = f"{unit.title}: more than a day passed between its dispatch and its receipt"
        if self._num_expired[unit.id] > self.config.compute.unit_retries:
            message = f"{message}, {self._num_expired[unit.id]} times: use smaller shards"
            self._handle_failure(Failed(finished.task, message), dispatcher)
            return
        message = f"{message}; encoding it again"
        self._progress.say("unit_expired", message, "warning", source=unit.title)
        dispatcher.add(finished.unit)

    def _handle_failure(self, event: Failed, dispatcher: Dispatcher) -> None:
        """Plan a changed source again; otherwise record the unit as failed and continue."""
        unit, message = event.task.unit, event.message
        if unit not in self.work.snapshot[unit.source]:
            return  # another unit of the source reported the change, and all are planned again
        self._num_changes[unit.source] += 1
        if event.changed and self._num_changes[unit.source] <= self.config.compute.unit_retries:
            try:
                shards = relist_source(unit.source, self.config.source.storage, self.moved)
            except (SourceError, StorageError) as error:
                message = str(error)
            else:
                for planned in self.work.replan(unit, shards):
                    dispatcher.add(planned)
                message = f"{unit.source} changed while it was read: encoding its new version"
                self._progress.say("unit_changed", message, source=unit.source)
                return
        self.counts.failed[unit.title] = message
        if event.lacks_field:
            self.fields.lacks(message)
        fields = {"unit": unit.id, "source": unit.title, "num_failed": len(self.counts.failed)}
        self._progress.say("unit_given_up", f"given up: {message}", "error", **fields)
        put_failure(self.output, unit, event.task.attempt, message)

    def check_gates(self) -> None:
        """Stop the run if a gate fails, because all further units would be wasted."""
        if not self.stop.reason:
            for status, message, fields in self.counts.failed_gates():
                self._progress.say("stopping", message, "error", reason=status, **fields)
                self.stop.request(status)

    def write_manifest(self) -> Manifest | None:
        """Write the next manifest if it differs from the newest one; return the newest one."""
        before = self.work.state.manifest
        manifest = self.work.write_manifest(may_complete=self.counts.may_complete)
        if manifest and manifest is not before:
            self._progress.log(
                "manifest_written",
                f"manifest {manifest.number} names {manifest.num_rows} rows",
                manifest=manifest.number,
                complete=manifest.complete,
                num_rows=manifest.num_rows,
                num_rejects=manifest.num_rejects,
            )
        return manifest


def _notes_of(receipt: Receipt) -> Iterator[tuple[str, str]]:
    """Yield the event and the message of each note on a unit that a user should see."""
    notes = receipt.notes or {}
    if (agreement_db := notes.get("decoder_agreement_db")) is not None:
        yield (
            "other_decoder",
            "qa.decoder belongs to another encoder than vae.checkpoint; on the QA images the "
            f"two agree to {agreement_db} dB, which is accepted",
        )
    triton = (receipt.versions or {}).get("triton", "")
    if triton.startswith("unusable"):
        message = f"a worker encodes without fused kernels, which is slower: triton is {triton}"
        yield "no_fused_kernels", message
    if notes.get("gathered_by_key"):
        yield (
            "gathered_by_key",
            f"{receipt.record.unit.title} is not grouped by key, or contains links: such tars are "
            "read three times; repack them with the files of each sample next to each other",
        )
    if receipt.extra_image_fields:
        fields = ", ".join(receipt.extra_image_fields)
        message = f"samples have further images, which are counted but not encoded: {fields}"
        yield "extra_images", message
