"""`hf://`, `gs://` and `az://`, on stand-ins that answer as their clients do.

None of these can be reached from a test. What their answers look like was read off the clients
(huggingface_hub, gcsfs, adlfs); the files themselves lie in memory.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec import AbstractFileSystem
from fsspec.registry import _registry

from latentcache import parse_config
from latentcache.errors import AccessDenied, ConfigError, SourceChanged
from latentcache.images.source import Sample, SourceShard, list_source, read_shard
from latentcache.storage import Store, backend
from latentcache.storage_options import StorageOptions
from makers import config_tree, pair, tar_bytes

CHANGED_AT = datetime(2026, 1, 1, tzinfo=UTC)


class _Hub(AbstractFileSystem):
    """Files in memory, listed in the form of some cloud's client."""

    store: ClassVar[dict[str, tuple[bytes, int]]]
    arguments: ClassVar[dict[str, Any]]

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        type(self).arguments = arguments

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.partition("://")[2].rstrip("/") if "://" in path else path.strip("/")

    def _full(self, path: str) -> str:
        return self._strip_protocol(path)

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        prefix = f"{self._full(path)}/"
        below = [name for name in self.store if name.startswith(prefix)]
        if not below:
            raise FileNotFoundError(path)
        heads = {name: name.removeprefix(prefix).partition("/")[0] for name in below}
        files = [self.entry(name) for name in below if name == prefix + heads[name]]
        folders = {prefix + head for name, head in heads.items() if name != prefix + head}
        return [
            *files,
            *({"name": name, "size": 0, "type": "directory"} for name in sorted(folders)),
        ]

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        if self._full(path) not in self.store:
            raise FileNotFoundError(path)
        return self.entry(self._full(path))

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        return io.BytesIO(self.store[self._full(path)][0])

    def entry(self, name: str) -> dict[str, Any]:
        data, number = self.store[name]
        return {"name": name, "size": len(data), "type": "file", **self.details(number)}

    def details(self, number: int) -> dict[str, Any]:
        raise NotImplementedError


class HuggingFace(_Hub):
    """Answers from its last listing unless a caller requests a refresh, and then in short form."""

    protocol = "hf"
    listed: ClassVar[dict[str, dict[str, Any]]] = {}

    def details(self, number: int) -> dict[str, Any]:
        return {"blob_id": f"{number:040x}", "lfs": None, "xet_hash": None, "last_commit": None}

    def ls(self, path: str, detail: bool = True, refresh: bool = False, **kwargs: Any) -> list[Any]:
        actual = super().ls(path)
        self.listed |= {entry["name"]: entry for entry in actual if refresh}
        return [self.listed.get(entry["name"], entry) for entry in actual]

    def info(
        self, path: str, refresh: bool = False, expand_info: bool = False, **kwargs: Any
    ) -> Any:
        name = self._full(path)
        if not refresh and name in self.listed:
            return self.listed[name]
        actual = super().info(path)
        short = {key: actual[key] for key in ("name", "size", "type")}
        return short if refresh and not expand_info else actual


class Google(_Hub):
    protocol = "gs"
    etags: ClassVar[Iterator[int]] = itertools.count()

    def details(self, number: int) -> dict[str, Any]:
        generation = str(1_700_000_000_000_000 + number)
        # Its ETag changes with an object's metadata, too.
        return {"etag": f"C{next(self.etags)}", "generation": generation, "mtime": CHANGED_AT}


class Azure(_Hub):
    protocol = "az"

    def details(self, number: int) -> dict[str, Any]:
        return {"etag": f"0x8DD{number:012X}", "last_modified": CHANGED_AT, "metadata": None}


@pytest.fixture(params=[HuggingFace, Google, Azure], ids=lambda kind: kind.protocol)
def hub(request: pytest.FixtureRequest) -> Iterator[type[_Hub]]:
    kind: type[_Hub] = request.param
    kind.store, HuggingFace.listed = {}, {}
    previous = _registry.get(kind.protocol)
    fsspec.register_implementation(kind.protocol, kind, clobber=True)
    backend._client.cache_clear()
    yield kind
    backend._client.cache_clear()
    del _registry[kind.protocol]
    if previous:
        fsspec.register_implementation(kind.protocol, previous, clobber=True)


ROOTS = {
    "hf": "datasets/someone/photos@refs%2Fconvert%2Fparquet/data",
    "gs": "bucket/photos",
    "az": "container/photos",
}


def put(hub: type[_Hub], name: str, data: bytes) -> None:
    path = f"{ROOTS[hub.protocol]}/{name}"
    hub.store[path] = (data, hub.store[path][1] + 1 if path in hub.store else 0)


def listed(hub: type[_Hub], **source: Any) -> list[SourceShard]:
    root = f"{hub.protocol}://{ROOTS[hub.protocol]}"
    tree = config_tree(Path("/none"))
    tree["source"] = {name: f"{root}{value}" for name, value in source.items()}
    return list_source(parse_config(tree).source)


def read(shard: SourceShard) -> list[Any]:
    return list(read_shard(shard, image=["jpg", "image"], keep=(), options=StorageOptions()))


def parquet_bytes(*images: bytes) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": pa.array(images, pa.binary())}), buffer)
    return buffer.getvalue()


def test_hub_gcs_and_azure_read_tar_parquet_and_folder_sources(hub: type[_Hub]):
    put(hub, "x.tar", tar_bytes(pair("a")))
    put(hub, "x.parquet", parquet_bytes(b"one", b"two"))
    put(hub, "images/deep/b.jpg", b"b")
    (tar,) = listed(hub, shards="/*.tar")
    assert [sample.key for sample in read(tar)] == ["a"]
    (parquet,) = listed(hub, shards="/x.parquet")
    assert read(parquet) == [Sample(f"{n:09d}", i, {}) for n, i in enumerate((b"one", b"two"))]
    (slot,) = listed(hub, folder="/images")
    assert read(slot) == [Sample("deep/b", b"b", {})]


@pytest.mark.parametrize("kind", ["shards", "folder"])
def test_a_new_version_changes_the_listing_and_an_unchanged_object_does_not(
    hub: type[_Hub], kind: str
):
    put(hub, "images/x.parquet", parquet_bytes(b"one"))
    put(hub, "images/x.jpg", b"one")
    url = {"shards": "/images/*.parquet", "folder": "/images"}[kind]
    (before,) = listed(hub, **{kind: url})
    assert listed(hub, **{kind: url}) == [before]
    assert before.version
    assert len(read(before)) == 1
    put(hub, "images/x.parquet", parquet_bytes(b"two"))  # of the same size
    (after,) = listed(hub, **{kind: url})
    assert after.size_bytes == before.size_bytes
    assert after.version != before.version
    if kind == "shards":
        with pytest.raises(SourceChanged, match=r"x\.parquet changed"):
            read(before)


def test_a_file_that_changes_after_the_listing_raises_source_changed(hub: type[_Hub]):
    put(hub, "images/x.jpg", b"one")
    (before,) = listed(hub, folder="/images")
    put(hub, "images/x.jpg", b"two")
    with pytest.raises(SourceChanged, match=r"x\.jpg changed"):
        read(before)


def test_clients_cache_no_listing_and_anon_sends_no_credentials(
    hub: type[_Hub],
):
    Store(f"{hub.protocol}://{ROOTS[hub.protocol]}", StorageOptions(anon=True))
    expected = {
        "hf": {},
        "gs": {
            "endpoint_url": None,
            "requester_pays": False,
            "use_listings_cache": False,
            "token": "anon",
        },
        "az": {"anon": True, "use_listings_cache": False},
    }
    assert hub.arguments == expected[hub.protocol]


def _foreign(name: str, base: type[Exception], module: str) -> Exception:
    """Make what a client that is not installed here would raise."""
    kind: type[Exception] = type(name, (base,), {"__module__": module})
    return kind("no")


@pytest.mark.parametrize(
    ("hub", "error"),
    [
        (Azure, _foreign("ClientAuthenticationError", Exception, "azure.core.exceptions")),
        (Google, _foreign("DefaultCredentialsError", Exception, "google.auth.exceptions")),
        (Google, OSError("Forbidden: bucket/photos\nno")),  # gcsfs
        (HuggingFace, _foreign("GatedRepoError", OSError, "huggingface_hub.errors")),
    ],
    indirect=["hub"],
    ids=["azure", "google", "gcsfs", "hub"],
)
def test_denied_access_is_not_retried(
    hub: type[_Hub], monkeypatch: pytest.MonkeyPatch, error: Exception
):
    num_asked = itertools.count(1)

    def refuse(self: _Hub, path: str, **kwargs: Any) -> Any:
        next(num_asked)
        raise error

    monkeypatch.setattr(hub, "info", refuse)
    with pytest.raises(AccessDenied, match=r"denied: .*; check the credentials"):
        Store(f"{hub.protocol}://{ROOTS[hub.protocol]}").info("x.tar")
    assert next(num_asked) == 2


@pytest.mark.parametrize(("protocol", "extra"), [("gs", "gcs"), ("az", "azure")])
def test_a_missing_client_names_the_extra_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, protocol: str, extra: str
):
    def missing(name: str, **arguments: Any) -> Any:
        raise ImportError(f"install the package for {name}")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    backend._client.cache_clear()
    with pytest.raises(ConfigError, match=rf"{protocol}://.*pip install 'latentcache\[{extra}\]'"):
        Store(f"{protocol}://bucket/photos")


class _AzureError(Exception):
    """What azure-core raises of a response: adlfs raises its own error from it."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status_code = status


@pytest.mark.parametrize(
    ("protocol", "cause", "expected"),
    [
        ("gs", None, "yes"),  # gcsfs raises it for a 412 alone, and drops the response
        ("az", _AzureError(409), "yes"),
        ("az", _AzureError(403), "unknown"),
        ("az", None, "unknown"),  # like a client that looks first, so that no server decides
    ],
)
def test_probe_conditional_understands_the_errors_of_gcsfs_and_adlfs(
    protocol: str, cause: Exception | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **options: object) -> None:
        assert options["mode"] == "create"
        raise FileExistsError("it exists") from cause

    kind = {"gs": Google, "az": Azure}[protocol]
    monkeypatch.setitem(_registry, protocol, kind)
    monkeypatch.setattr(kind, "pipe_file", refuse)
    store = Store(f"{protocol}://bucket/out")
    assert store.probe_conditional("contract.json", b"") == (expected == "yes")
    assert store.conditional == expected
