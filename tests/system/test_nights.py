"""Night after night over a bucket that changes: what is encoded, written, reported and deleted."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

import latentcache
from corpus import Shard, good, objects
from latentcache.engine import run as run_module
from latentcache.storage import Store
from runs import Cli, Configs, Row, open_at, rows_of
from servers import S3Server

DAY_S = 86400.0
FIRST = [good(f"{number:02d}.tar", seed=number, num_samples=1) for number in range(10)]
NEW = [good(f"{number:02d}.tar", seed=number, num_samples=1) for number in range(10, 13)]
REPLACED, VANISHED = "03.tar", "07.tar"
REPLACEMENT = good(REPLACED, seed=99, num_samples=2)


@dataclass
class Nights:
    """A bucket of shards, one of latents, and a config that a scheduler runs each night."""

    server: S3Server
    cli: Cli
    photos: str
    latents: str
    config: Path

    @property
    def url(self) -> str:
        return f"s3://{self.latents}"

    def upload(self, *shards: Shard) -> None:
        for key, data in objects(list(shards)).items():
            self.server.client.put_object(Bucket=self.photos, Key=key, Body=data)

    def night(self, *, encodes: int) -> tuple[dict[str, Any], Counter[str]]:
        """Run; gives the summary, and how many objects of which kind were written."""
        before = self.server.listing(self.latents)
        if encodes:
            summary = self.cli.ok("run", self.config)
        else:
            summary = asdict(latentcache.run(latentcache.load_config(self.config), quiet=True))
        assert (summary["status"], summary["num_committed"]) == ("complete", encodes)
        after = self.server.listing(self.latents)
        assert before.items() <= after.items(), "nothing is replaced or deleted"
        return summary, Counter(key.partition("/")[0] for key in after.keys() - before.keys())

    def plan(self) -> tuple[int, int, int, int, list[str]]:
        plan = latentcache.make_plan(latentcache.load_config(self.config))
        actual = plan.sources
        numbers = (actual.num_new, actual.num_changed, actual.num_unchanged, actual.num_vanished)
        return (*numbers, sorted(Path(p.unit.source).name for p in plan.pending))

    def rows(self, manifest: int) -> list[Row]:
        return rows_of(open_at(self.server, self.url, manifest))

    def shards_in(self, manifest: int) -> Counter[str]:
        return Counter(name for name, *_ in self.rows(manifest))

    def diff(self, before: int, after: int) -> dict[str, list[str]]:
        actual = latentcache.diff_manifests(self.url, before, after, storage=self.server.options)
        return {
            kind: [Path(diff.source).name for diff in getattr(actual, kind)]
            for kind in ("added", "replaced", "removed")
        }

    def verify(self, *manifests: int) -> None:
        for number in manifests:
            assert latentcache.verify(self.url, number, storage=self.server.options).ok


def no_actor(*_: object) -> None:
    raise AssertionError("there is nothing to encode, so no actor is wanted")


def first_day(name: str, moto: S3Server, cli: Cli, configs: Configs, on_missing: str) -> Nights:
    photos, latents = f"{name}-photos", f"{name}-latents"
    source, output = moto.make_bucket(photos, objects(FIRST)), moto.make_bucket(latents)
    config = configs.write(source, output, endpoint_url=moto.endpoint_url)
    config.write_text(
        config.read_text().replace("source:\n", f"source:\n  on_missing: {on_missing}\n")
    )
    nights = Nights(moto, cli, photos, latents, config)
    assert nights.plan() == (10, 0, 0, 0, [shard.name for shard in FIRST])
    summary, written = nights.night(encodes=10)
    assert summary["manifest"] == 1
    assert written["commits"] == 10
    assert (written["parts"], written["manifests"], written["runs"]) == (1, 1, 0)
    return nights


@pytest.mark.parametrize("on_missing", ["keep", "drop"])
def test_nightly_runs_follow_a_changing_bucket(
    on_missing: str,
    moto: S3Server,
    cli: Cli,
    configs: Configs,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nights = first_day(f"nights-{on_missing}", moto, cli, configs, on_missing)
    monkeypatch.setattr(run_module, "Cluster", no_actor)  # of this process, where nights are idle
    old_rows = nights.rows(1)

    # Day 2: three new, one replaced, one vanished.
    nights.upload(*NEW, REPLACEMENT)
    moto.client.delete_object(Bucket=nights.photos, Key=VANISHED)
    fresh = sorted([REPLACED, *(shard.name for shard in NEW)])
    assert nights.plan() == (3, 1, 8, 1, fresh)
    summary, written = nights.night(encodes=4)
    assert (summary["manifest"], summary["num_skipped"]) == (2, 8)
    num_files = written.pop("data")
    assert num_files == 3 + 2  # one sample each; the two of the replacement differ in their bucket
    assert written == {"commits": 4, "parts": 1, "manifests": 1}
    gone = [VANISHED] if on_missing == "drop" else []
    news = [shard.name for shard in NEW]
    assert nights.diff(1, 2) == {"added": news, "replaced": [REPLACED], "removed": gone}
    kept = {shard.name for shard in FIRST} - set(gone)
    assert nights.shards_in(2) == Counter([*kept, *news, REPLACED])  # which has two rows now
    assert nights.rows(1) == old_rows

    # Day 3: nothing.
    listing = moto.listing(nights.latents)
    vanished = 0 if on_missing == "drop" else 1
    assert nights.plan() == (0, 0, 12, vanished, [])
    summary, written = nights.night(encodes=0)
    assert (summary["manifest"], written) == (2, {})
    assert moto.listing(nights.latents) == listing

    # Day 4: the replaced shard is back to its first bytes, and encoded again.
    nights.upload(FIRST[3])
    assert nights.plan() == (0, 1, 11, vanished, [REPLACED])
    summary, written = nights.night(encodes=1)
    assert summary["manifest"] == 3
    assert written == {"commits": 1, "data": 1, "parts": 1, "manifests": 1}
    assert nights.diff(2, 3) == {"added": [], "replaced": [REPLACED], "removed": []}
    assert nights.diff(1, 3) == {"added": news, "replaced": [REPLACED], "removed": gone}
    assert [row for row in nights.rows(3) if row[0] in kept] == [
        row for row in old_rows if row[0] in kept
    ]
    nights.verify(1, 2, 3)
    if on_missing == "drop":
        collect(nights, monkeypatch)


def collect(nights: Nights, monkeypatch: pytest.MonkeyPatch) -> None:
    """A week later: first all manifests are kept, then the newest alone."""
    server, options = nights.server, nights.server.options
    actor = latentcache.open_dataset(nights.url, 1, storage=options).units[0]
    orphan = actor.files[0].path.replace(actor.attempt, "0" * 32)
    server.client.put_object(Bucket=nights.latents, Key=orphan, Body=b"lost")
    upload = {"Bucket": nights.latents, "Key": actor.files[0].path}
    server.client.create_multipart_upload(**upload)
    now = Store.now
    monkeypatch.setattr(Store, "now", lambda self: now(self) + 8 * DAY_S)

    before = server.listing(nights.latents)
    listed = latentcache.collect_unreferenced(nights.url, storage=options)
    assert server.listing(nights.latents) == before
    assert [each.path for each in listed.objects["files"]] == [orphan]
    assert (listed.num_objects, len(listed.uploads)) == (1, 1)
    latentcache.collect_unreferenced(nights.url, delete=True, storage=options)
    assert server.listing(nights.latents).keys() == before.keys() - {orphan}
    assert not server.client.list_multipart_uploads(Bucket=nights.latents).get("Uploads")
    nights.verify(1, 2, 3)

    rows = nights.rows(3)
    latentcache.publish(nights.url, 3, storage=options)
    deleted = latentcache.collect_unreferenced(
        nights.url, delete=True, keep_last=1, storage=options
    )
    # The unit that was replaced, its replacement, and that of the shard that vanished.
    assert deleted.kept == [3]
    assert len(deleted.objects["receipts"]) == 3
    assert len(deleted.objects["files"]) == 1 + 2 + 1
    nights.verify(3)
    assert nights.rows(3) == rows

    # It comes back: what was deleted is not taken to be there.
    nights.upload(REPLACEMENT)
    assert nights.plan() == (0, 1, 11, 0, [REPLACED])
    nights.upload(FIRST[3])
    summary, written = nights.night(encodes=0)
    assert (summary["manifest"], written) == (3, {})
    again = latentcache.collect_unreferenced(nights.url, delete=True, keep_last=1, storage=options)
    assert again.num_objects == 0
