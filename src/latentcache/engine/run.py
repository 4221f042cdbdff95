"""The driver: plan, establish the contract, dispatch units, put receipts, write manifests.

One process makes results visible. Actors upload files; only the driver puts the receipts that make
those files count.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from dataclasses import asdict, replace
from functools import partial

from latentcache.config import Config, require_kind
from latentcache.dataset.contract import (
    require_same,
)
from latentcache.dataset.manifest import Manifest
from latentcache.dataset.receipts import Unit, put_failure
from latentcache.engine.actors import Failed, Finished, Retries
from latentcache.engine.cluster import Cluster
from latentcache.engine.commit import Committed, Committer, Expired
from latentcache.engine.contract_setup import put_contract, resolve_contract
from latentcache.engine.dispatcher import Dispatcher
from latentcache.engine.job import make_job
from latentcache.engine.kept_fields import FieldCheck, spread
from latentcache.engine.lease import Lease, active_runs, stand_aside
from latentcache.engine.plan import (
    Plan,
    make_plan,
)
from latentcache.engine.progress import RunProgress
from latentcache.engine.prometheus import RunMetrics
from latentcache.engine.receipt_notes import notes_of
from latentcache.engine.run_counts import RunCounts
from latentcache.engine.stop import StopSignal, stop_on_signals
from latentcache.engine.summary import RunSummary, summarise
from latentcache.engine.waiting import WaitPolicy
from latentcache.engine.work import Work
from latentcache.errors import AccessDenied, SourceError, StorageError
from latentcache.images.moved import Moved, moved_of
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

    A run that is called again after an interruption or an error continues where the last one
    stopped.

    Args:
        config: the config of the run.
        retry_rejects: encode units with rejects again.
        quiet: write no progress to stderr.
        log_json: write JSON objects to stderr, one per line.
        plan: the plan from `make_plan`; None makes one.

    Raises:
        ContractMismatch: the output holds latents of another contract.
        LatentCacheError: the run cannot start, or an error affects all units.
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
            summary = _summary(driver, plan.state.manifest, began)
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
        summary = _summary(driver, manifest, began)
        _log_end(progress, summary)
    return summary


def _summary(driver: _Driver, manifest: Manifest | None, began: float) -> RunSummary:
    return summarise(
        driver.work,
        driver.counts,
        driver.output,
        manifest,
        driver.stop.reason,
        driver.failed,
        time.monotonic() - began,
    )


def _log_end(progress: RunProgress, summary: RunSummary) -> None:
    fields = asdict(summary)
    fields["num_failed"] = len(fields.pop("failed"))  # each has its own event
    level: Level = "error" if summary.exit_code else "info"
    progress.log("run_ended", f"the run ended: {summary.status}", level, **fields)


def _say_stopping(progress: RunProgress) -> None:
    progress.say("stopping", _STOPPING, "warning", reason="interrupted")


class _Driver:
    """The driver of one run, and the only writer of receipts and manifests in it."""

    def __init__(self, config: Config, plan: Plan, stop: StopSignal) -> None:
        self.config = config
        self.output: Store = plan.output
        self.stop = stop
        self.work = Work(config, plan)
        done = self.work.done()
        self.counts = RunCounts(config, done, len(plan.units) - len(plan.pending))
        self.moved = moved_of(config.source)
        self.failed: dict[str, str] = {}
        self.replans: Counter[str] = Counter()
        self.num_expired: Counter[str] = Counter()
        selection = FieldSelection(plan.contract.source.image_fields, ())
        self.fields = FieldCheck(self.work.columns, done, selection.is_image)
        self._has_said: set[str] = set()
        self._manifest_at = (0, time.monotonic())

    def encode(self, progress: RunProgress) -> None:
        """Encode the pending units until all are done or the run is stopped."""
        compute, work = self.config.compute, self.work
        threads = None if compute.decode_threads == "auto" else compute.decode_threads
        with Lease(self.output, len(work.pending), work.num_total) as lease:
            lease.wait_for_gc(self.stop, partial(progress.say, "waiting"))
            if self.stop.reason:
                return
            wait_policy = WaitPolicy(
                compute.wait_for_gpus_s, partial(progress.say, "waiting"), lease.renew
            )
            with (
                Cluster(compute.num_gpus, compute.num_cpu_actors, threads, wait_policy) as cluster,
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
                self.write_manifest(progress)  # under the lease: some stores need it

    def _establish_contract(self, cluster: Cluster, progress: RunProgress) -> None:
        work = self.work
        planned = work.contract
        resolved = resolve_contract(self.config, planned, work.shards, cluster, progress)
        contract = put_contract(self.config, self.output, planned, resolved)
        if contract != planned:
            work.adopt(contract)

    def _dispatcher(self, cluster: Cluster) -> Dispatcher:
        compute, work = self.config.compute, self.work
        if self.fields.is_open:
            work.pending = spread(work.pending)
        job = make_job(self.config, work.contract, cluster.num_cpus_per_actor)
        loads_late = all(planned.kind == "rewrite" for planned in work.pending)
        return Dispatcher(
            cluster,
            replace(job, loads_late=loads_late),
            work.pending,
            Retries(compute.unit_retries, compute.preemption_retries),
            self.stop,
            partial(_may_read, self.config, self.moved),
        )

    def _encode_units(
        self,
        dispatcher: Dispatcher,
        committer: Committer,
        lease: Lease,
        metrics: RunMetrics,
        progress: RunProgress,
    ) -> None:
        """Encode the units of the dispatcher and put their receipts."""
        dispatcher.qa_wanted = self.counts.qa_wanted(self.work.contract)
        for event in dispatcher.run():
            lease.num_committed = self.counts.num_committed
            lease.renew()
            if isinstance(event, Finished):
                for finished in self.fields.offer(event):
                    committer.put(finished)
            elif isinstance(event, Failed):
                self._give_up(event, dispatcher, progress)
            else:
                progress.polled(event.stats, event.num_lost)
                metrics.update_actors(len(event.stats), event.num_lost)
                self._update_metrics(metrics)
            for result in committer.ended():
                self._take(result, dispatcher, progress)
                dispatcher.qa_wanted = self.counts.qa_wanted(self.work.contract)
        if not self.stop.reason:
            self.fields.end(len(self.failed))
        if self.fields.warning:
            progress.say("no_such_field", self.fields.warning, "warning")
        for finished in self.fields.release():
            committer.put(finished)
        for result in committer.drain():
            self._take(result, dispatcher, progress)
        self._update_metrics(metrics)

    def _join(self, lease: Lease, progress: RunProgress) -> None:
        """Use another order of units than other active runs; refuse where two runs are unsafe."""
        if not self.output.is_conditional:
            problem = "has no conditional writes"
            if self.output.conditional == "unknown":
                problem = "did not answer whether it has conditional writes (unknown)"
            message = f"{self.output.url} {problem}: one run at a time, by lease"
            progress.say("no_conditional_writes", message)
            lease.require_alone()
        elif others := lease.others():
            # A run skips units that another run has committed. In random order they overlap little.
            self.work.pending = random.sample(self.work.pending, len(self.work.pending))
            progress.say("joining", f"joining another run: {others[0]} (compute.on_busy)")

    def _update_metrics(self, metrics: RunMetrics) -> None:
        num_failed = len(self.failed)
        num_left = len(self.work.left) - num_failed
        metrics.update_units(self.counts.num_committed, num_left, num_failed)

    def _take(
        self, result: Committed | Expired, dispatcher: Dispatcher, progress: RunProgress
    ) -> None:
        """Count a unit whose receipt was put, or encode it again if its receipt was too late."""
        if isinstance(result, Expired):
            self._encode_again(result.finished, dispatcher, progress)
            return
        receipt = result.receipt
        self.counts.add(result, self.work.add(receipt))
        for event, message in notes_of(receipt).items():
            if event not in self._has_said:
                self._has_said.add(event)
                progress.say(event, message, "warning")
        progress.unit_done(receipt.record.num_rows, receipt.record.num_rejects)
        self._check(progress)
        num_units, since = self._manifest_at
        if (
            self.counts.num_committed - num_units >= MANIFEST_EVERY_UNITS
            or time.monotonic() - since >= MANIFEST_EVERY_S
        ):
            self.write_manifest(progress)
            self._manifest_at = (self.counts.num_committed, time.monotonic())

    def _encode_again(
        self, finished: Finished, dispatcher: Dispatcher, progress: RunProgress
    ) -> None:
        """Dispatch again a unit whose receipt came too late; give it up after its retries."""
        unit = finished.unit.unit
        self.num_expired[unit.id] += 1
        message = f"{unit.title}: more than a day passed between its dispatch and its receipt"
        if self.num_expired[unit.id] > self.config.compute.unit_retries:
            message = f"{message}, {self.num_expired[unit.id]} times: use smaller shards"
            self._give_up(Failed(finished.task, message), dispatcher, progress)
            return
        progress.say("unit_expired", f"{message}; encoding it again", "warning", source=unit.title)
        dispatcher.add(finished.unit)

    def _give_up(self, event: Failed, dispatcher: Dispatcher, progress: RunProgress) -> None:
        """Plan a changed source again; otherwise record the unit as failed and continue."""
        unit, message = event.task.unit, event.message
        if unit not in self.work.listing[unit.source]:
            return  # another unit of the source reported the change, and all are planned again
        self.replans[unit.source] += 1
        if event.changed and self.replans[unit.source] <= self.config.compute.unit_retries:
            try:
                shards = relist_source(unit.source, self.config.source.storage, self.moved)
            except (SourceError, StorageError) as error:
                message = str(error)
            else:
                for planned in self.work.replan(unit, shards):
                    dispatcher.add(planned)
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

    def _check(self, progress: RunProgress) -> None:
        """Stop the run if a gate fails, because all further units would be wasted."""
        if self.stop.reason:
            return
        for stop in self.counts.stop_reasons(at_work=bool(self.work.left)):
            progress.say("stopping", stop.message, "error", reason=stop.status, **stop.fields)
            self.stop.request(stop.status)

    def write_manifest(self, progress: RunProgress) -> Manifest | None:
        """Write the next manifest if it differs from the newest one; return the newest one."""
        before, at_work = self.work.state.manifest, bool(self.work.left)
        manifest = self.work.write_manifest(
            may_complete=not (
                self.counts.has_too_many_rejects(at_work=at_work)
                or self.work.has_no_rows
                or self.counts.qa_totals.breaches()
            )
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


def _may_read(config: Config, moved: Moved, unit: Unit) -> bool:
    """Return whether this process may read a source that a store refused to an actor."""
    folder, name = split_url(moved.location(unit.source))
    store = Store(folder, config.source.storage)
    try:
        with store.open(name) as file:
            file.read(1)
    except AccessDenied:
        return False
    except StorageError:
        return True  # any other error does not mean missing permissions
    return True
