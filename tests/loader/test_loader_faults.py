"""An error is one line, raised in its turn; and nothing outlives an interrupted loop."""

from __future__ import annotations

import gc
import re
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
import torch

import makers
from latentcache import Batch, LatentLoader, open_dataset
from latentcache.dataset.columns import columns_of
from latentcache.dataset.receipts import Unit
from latentcache.dataset.state import State, write_next
from latentcache.errors import ConfigError, DatasetError, LatentCacheError
from latentcache.storage import Store
from reference import assert_stored, read_rows
from servers import DEADLINE_S, wait_until
from synthetic import make_contract, write_dataset

SMALL, TALL, WIDE = (64, 64), (64, 96), (96, 64)
FORMATS = pytest.mark.parametrize("format", ["parquet", "safetensors"])


@pytest.fixture
def url(tmp_path: Path) -> str:
    return write(tmp_path / "data")


def write(folder: Path, format: str = "parquet", units: int = 6, rows: int = 8) -> str:
    contract = make_contract([SMALL, TALL, WIDE], format=format)
    write_dataset(str(folder), contract, [{SMALL: rows}] * units)
    return str(folder)


def in_order(url: str, **options: Any) -> LatentLoader:
    """Two batches from each file, one file after the other."""
    stored = {"normalize": False, "dtype": torch.float16, "columns": ["unit", "key"]}
    return LatentLoader(url, **({"batch_size": 4, "shuffle": False} | stored | options))


def file_of(url: str, unit: int, ending: str) -> Path:
    names = [file.path for file in open_dataset(url).units[unit].files]
    (name,) = (name for name in names if name.endswith(ending))
    return Path(url, name)


def take(batches: Iterator[Batch]) -> tuple[list[Batch], LatentCacheError]:
    """Take batches until there is an error, as there must be."""
    taken: list[Batch] = []
    with pytest.raises(LatentCacheError) as caught:
        taken.extend(batches)
    return taken, caught.value


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def garble(path: Path) -> None:
    """Both formats' headers, at the beginning or the end, become something else."""
    size = path.stat().st_size
    path.write_bytes((b"not a header " * size)[:size])


@FORMATS
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "which the manifest lists, is gone: run `latentcache verify --repair`"),
        (cut, r"has \d+ bytes, not \d+: run `latentcache verify --repair`"),
        (empty, r"has 0 bytes, not \d+: run `latentcache verify --repair`"),
        (lengthen, r"has \d+ bytes, not \d+: run `latentcache verify --repair`"),
        (garble, "is damaged: .*; run `latentcache verify`"),
    ],
)
def test_a_damaged_file_is_named_after_the_batches_before_it(
    tmp_path: Path, format: str, damage: Callable[[Path], None], message: str
) -> None:
    url, rows = write(tmp_path, format), read_rows(tmp_path)
    endings = [".parquet"] if format == "parquet" else [".rows.parquet", ".safetensors"]
    for ending in endings:
        paths = [file_of(url, unit, ending) for unit in (3, 4, 5)]
        whole = [path.read_bytes() for path in paths]
        for path in paths:
            damage(path)
        loader = in_order(url)
        batches, error = take(iter(loader))
        assert [batch.step for batch in batches] == [0, 1, 2, 3, 4, 5]
        for batch in batches:
            assert_stored(batch, rows)
        assert isinstance(error, DatasetError)
        assert re.search(f"file://{paths[0]}.*{message}", str(error))
        assert "\n" not in str(error)

        # The next iteration goes on once all is well again.
        for path, data in zip(paths, whole, strict=True):
            path.write_bytes(data)
        batches = list(loader)
        assert [batch.step for batch in batches] == list(range(12))
        for batch in batches:
            assert_stored(batch, rows)


def test_a_second_iteration_opens_failed_files_again(tmp_path: Path) -> None:
    """Two files of one batch are gone; both are there again."""
    url, rows = write(tmp_path), read_rows(tmp_path)
    loader, paths = in_order(url, batch_size=16), [file_of(url, n, ".parquet") for n in (2, 3)]
    for path in paths:
        path.rename(path.with_suffix(".away"))
    batches, _ = take(iter(loader))
    assert len(batches) == 1
    for path in paths:
        path.with_suffix(".away").rename(path)
    batches = list(loader)
    assert len(batches) == 3
    for batch in batches:
        assert_stored(batch, rows)


def test_state_after_an_error_resumes_at_the_failed_batch(tmp_path: Path) -> None:
    url = write(tmp_path)
    loader, path = in_order(url), file_of(url, 3, ".parquet")
    data = path.read_bytes()
    path.unlink()
    take(iter(loader))
    assert (loader.epoch, loader.state_dict()["step"]) == (0, 6)
    path.write_bytes(data)
    loader.load_state_dict(loader.state_dict())
    assert [batch.step for batch in loader] == [6, 7, 8, 9, 10, 11]


@FORMATS
def test_columns_that_cannot_be_read_name_their_file(tmp_path: Path, format: str) -> None:
    path = file_of(write(tmp_path, format), 3, ".parquet")
    path.write_bytes(path.read_bytes().replace(b"crop_top", b"crop_tap"))
    batches, error = take(iter(in_order(str(tmp_path))))
    assert len(batches) == 6
    assert str(error).startswith(f"file://{path} is damaged: ")


def test_every_wrong_digit_in_a_safetensors_header_is_rejected(tmp_path: Path) -> None:
    """Rows are copied from where it says: each of its digits matters."""
    url = write(tmp_path, "safetensors", units=1)
    path = file_of(url, 0, ".safetensors")
    whole = path.read_bytes()
    header = whole[8:256]
    digits = [match.start() for match in re.finditer(rb"\d", header)]
    assert len(digits) >= 10
    for position in digits:
        for digit in b"09":
            garbled = bytearray(header)
            garbled[position] = digit
            if bytes(garbled) == header:
                continue
            path.write_bytes(whole[:8] + garbled + whole[256:])
            with pytest.raises(DatasetError, match=f"file://{path} is damaged: .*verify"):
                list(in_order(url))


def test_urls_without_a_dataset_are_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=f"{tmp_path} is not a latent dataset"):
        LatentLoader(str(tmp_path), batch_size=4)
    with pytest.raises(ConfigError, match="nonsense:// URLs are not supported"):
        LatentLoader("nonsense://there", batch_size=4)
    with pytest.raises(ConfigError, match="no dataset is given"):
        LatentLoader({}, batch_size=4)


def test_missing_and_incomplete_manifests_are_named(tmp_path: Path) -> None:
    contract = makers.make_contract()
    makers.write_dataset(
        tmp_path, contract, {"a.tar": {SMALL: makers.make_latents(contract, SMALL, 4)}}
    )
    url = str(tmp_path / "out")
    with pytest.raises(DatasetError, match=f"{url} has no manifest 7; it has 1 to 1"):
        LatentLoader(url, batch_size=4, manifest=7)
    (tmp_path / "out" / "manifests" / "00000001.json").rename(tmp_path / "kept")
    with pytest.raises(DatasetError, match=f"{url} has no manifest yet"):
        LatentLoader(url, batch_size=4)

    store = Store(url)
    listing = {s: [Unit.of(s, 1000, "v1", contract.fingerprint)] for s in ("a.tar", "b.tar")}
    write_next(
        State(store),
        contract.fingerprint,
        4,
        lambda: listing,
        on_missing="keep",
        columns=columns_of(["txt"]),
    )
    with pytest.raises(DatasetError, match=r"no complete manifest yet.* name manifest 1"):
        LatentLoader(url, batch_size=4)
    assert len(LatentLoader(url, batch_size=4, manifest=1)) == 1


def test_missing_and_damaged_manifest_parts_are_named(url: str) -> None:
    (part,) = Path(url, "parts").iterdir()
    makers.flip_byte(part)
    with pytest.raises(DatasetError, match=f"{part} is damaged"):
        LatentLoader(url, batch_size=4)
    part.unlink()
    with pytest.raises(DatasetError, match=f"{part}, which does not exist"):
        LatentLoader(url, batch_size=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": -4}, "batch_size is -4"),
        ({"batch_size": 49}, "has 48 rows, but no bucket has a whole batch of 49: lower batch"),
        ({"window_rows": 0}, "window_rows is 0"),
        ({"block_rows": 0}, "block_rows is 0"),
        ({"tail": "wrap"}, "tail is 'wrap': it must be 'drop', 'pad' or 'short'"),
        ({"dtype": torch.int32}, r"dtype is torch.int32: .*floating-point"),
        ({"dtype": "float16"}, r"dtype is .?float16.?: .*floating-point"),
        ({"columns": ["text"]}, r"has no column 'text'; it has .*'caption'"),
        ({"cache_bytes": "many"}, "'many' is not a size"),
        ({"prefetch_bytes": "1 cup"}, "'1 cup' is not a size"),
        ({"manifest": {"elsewhere": 1}}, "manifest names elsewhere, which is not among"),
    ],
)
def test_invalid_arguments_are_rejected(url: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        LatentLoader(url, **({"batch_size": 4} | options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tail", ["drop", "pad", "short"])
def test_a_dataset_without_rows_is_named(tmp_path: Path, tail: str) -> None:
    write_dataset(str(tmp_path), make_contract([SMALL]), [{}])
    with pytest.raises(DatasetError, match=f"{tmp_path} has no rows"):
        LatentLoader(str(tmp_path), batch_size=4, tail=tail)


def test_buckets_without_a_whole_batch_are_warned_about(
    tmp_path: Path,
) -> None:
    contract = make_contract([SMALL, TALL, WIDE])
    write_dataset(str(tmp_path), contract, [{SMALL: 9, TALL: 2}, {TALL: 1}])
    with pytest.warns(UserWarning, match=r"fewer rows than batch_size 4.*: 64x96 \(3 rows\)") as w:
        loader = LatentLoader(str(tmp_path), batch_size=4)
    assert w[0].filename == __file__, "it points at the caller"
    assert loader.buckets == {SMALL: 2, TALL: 0}
    assert {batch.bucket for batch in loader} == {SMALL}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader = LatentLoader(str(tmp_path), batch_size=4, tail="pad")
    assert loader.buckets == {SMALL: 3, TALL: 1}


def threads_of_loaders() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("latentcache")]


def test_no_thread_outlives_its_iteration_and_its_loader(url: str) -> None:
    gc.collect()
    wait_until(lambda: not threads_of_loaders(), "the threads of other tests")
    loader = LatentLoader(url, batch_size=4, prefetch_bytes="1gb")
    for _ in loader:
        assert threads_of_loaders()
        break
    batches = iter(loader)
    next(batches)
    del loader, batches
    wait_until(lambda: not threads_of_loaders(), "the loader's threads")


_SCRIPT = """
import sys
from latentcache import LatentLoader
loader = LatentLoader(sys.argv[1], batch_size=4, prefetch_bytes="1gb")
batches = iter(loader)
next(batches)
print("begun", flush=True)
while sys.argv[2] == "go on":
    for batch in loader:
        pass
"""


@contextmanager
def running(url: str, what: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", _SCRIPT, url, what]
    with subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_program_may_exit_within_an_epoch(tmp_path: Path) -> None:
    with running(write(tmp_path, rows=1000), "end") as process:
        _, said = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, said) == (0, "")


def test_ctrl_c_within_an_epoch_ends_the_program(tmp_path: Path) -> None:
    with running(write(tmp_path, rows=1000), "go on") as process:
        assert process.stdout
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == -signal.SIGINT
    assert said.count("Traceback") == 1
    assert said.endswith("KeyboardInterrupt\n")
