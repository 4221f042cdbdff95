"""Several datasets in one loader: exact shares, one meaning of latents, any format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import makers
from latentcache import LatentLoader
from latentcache.dataset.contract import Contract
from latentcache.errors import ConfigError, ContractMismatch, DatasetError
from reference import Identity, assert_stored, identities, normalized, read_rows
from synthetic import make_contract, write_dataset

SMALL, TALL, WIDE = (64, 64), (64, 96), (96, 64)


def write(
    folder: Path,
    contract: Contract,
    *units: dict[tuple[int, int], int],
    keep: Sequence[str] = ("txt",),
) -> str:
    """A dataset whose units are no other's: their ids have the contract in them."""
    transform = replace(contract.transform, min_side_px=sum(folder.name.encode()))
    write_dataset(str(folder), replace(contract, transform=transform), units, keep=keep)
    return str(folder)


def load(urls: dict[str, float], **options: Any) -> LatentLoader:
    stored = {"normalize": False, "dtype": torch.float16, "columns": ["unit", "key"]}
    return LatentLoader(urls, **({"batch_size": 4, "tail": "short"} | stored | options))


def epoch_of(loader: LatentLoader) -> list[Identity]:
    return [identity for batch in loader for identity in identities(batch)]


@pytest.mark.parametrize("shuffle", [True, False])
def test_each_dataset_has_its_share_of_every_epoch_and_uses_rows_in_turn(
    tmp_path: Path, shuffle: bool
) -> None:
    contract = make_contract([SMALL, TALL])
    large = write(tmp_path / "large", contract, {SMALL: 40}, {SMALL: 20})
    small = write(tmp_path / "small", contract, {SMALL: 24}, {SMALL: 16})
    loader = load({large: 3, small: 1}, shuffle=shuffle)
    assert loader.num_rows == 100
    assert len(loader) == 25
    rows = {name: set(read_rows(Path(name))) for name in (large, small)}
    seen = Counter[Identity]()
    for number in range(1, 5):
        epoch = epoch_of(loader)
        assert sum(identity in rows[large] for identity in epoch) == 75
        assert sum(identity in rows[small] for identity in epoch) == 25
        seen.update(epoch)
        for name, share in ((large, 75), (small, 25)):
            times = {seen[identity] for identity in rows[name]}
            assert max(times) - min(times) <= 1, "some have had two more turns than others"
            assert sum(seen[identity] for identity in rows[name]) == number * share


def test_shares_are_exact_within_each_bucket_mix(tmp_path: Path) -> None:
    """A dataset's share is divided among its buckets as its rows are; the rest is rounding."""
    contract = make_contract([SMALL, TALL, WIDE])
    one = write(tmp_path / "one", contract, {SMALL: 30, TALL: 10})
    other = write(tmp_path / "other", contract, {TALL: 10, WIDE: 50})
    loader = load({one: 0.3, other: 0.7})
    rows = read_rows(Path(one)) | read_rows(Path(other))
    owners = {identity: name for name in (one, other) for identity in read_rows(Path(name))}
    shares = Counter[tuple[str, tuple[int, int]]]()
    for batch in loader:
        assert_stored(batch, rows)
        shares.update((owners[identity], batch.bucket) for identity in identities(batch))
    assert [shares[one, bucket] for bucket in (SMALL, TALL)] in ([23, 7], [22, 8])
    assert [shares[other, bucket] for bucket in (TALL, WIDE)] in ([12, 58], [11, 59])


def test_mixed_datasets_may_differ_in_format_and_transform(tmp_path: Path) -> None:
    urls = [
        write(tmp_path / format, make_contract([SMALL, TALL], format=format), {SMALL: 9, TALL: 7})
        for format in ("parquet", "safetensors")
    ]
    rows = read_rows(Path(urls[0])) | read_rows(Path(urls[1]))
    loader = load(dict.fromkeys(urls, 1), shuffle=True)
    seen = []
    for batch in loader:
        assert_stored(batch, rows)
        seen += identities(batch)
    assert sorted(seen) == sorted(rows)


def test_default_columns_of_a_mixture_are_those_of_all_datasets(tmp_path: Path) -> None:
    contract = make_contract([SMALL])
    one = write(tmp_path / "one", contract, {SMALL: 4}, keep=("txt", "cls"))
    other = write(tmp_path / "other", contract, {SMALL: 4}, keep=("url", "cls"))
    batch = next(iter(LatentLoader({one: 1, other: 1}, batch_size=4)))
    assert list(batch.columns) == ["cls"]
    with pytest.raises(ConfigError, match=f"{other} has no column 'caption'"):
        LatentLoader({one: 1, other: 1}, batch_size=4, columns=["caption"])


def with_vae(contract: Contract, **changes: Any) -> Contract:
    return replace(contract, vae=replace(contract.vae, **changes))


def with_latents(contract: Contract, **changes: Any) -> Contract:
    return replace(contract, latents=replace(contract.latents, **changes))


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("vae.scaling_factor", with_vae(make_contract([SMALL]), scaling_factor=0.13025)),
        ("vae.shift_factor", with_vae(make_contract([SMALL]), shift_factor=0.1)),
        ("vae.encoder_fingerprint", with_vae(make_contract([SMALL]), encoder_fingerprint="1" * 64)),
        ("latents.posterior", with_latents(make_contract([SMALL]), posterior="moments")),
        ("latents.dtype", with_latents(make_contract([SMALL]), dtype="float32")),
    ],
)
def test_mixing_latents_of_different_meaning_is_rejected(
    tmp_path: Path, field: str, other: Contract
) -> None:
    urls = [
        write(tmp_path / "one", make_contract([SMALL]), {SMALL: 4}),
        write(tmp_path / "other", other, {SMALL: 4}),
    ]
    with pytest.raises(ContractMismatch, match=f"{urls[1]} cannot be mixed") as caught:
        load(dict.fromkeys(urls, 1))
    assert [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]] == [field]


def test_mixed_datasets_may_differ_in_int8_calibration(tmp_path: Path) -> None:
    contract = make_contract([SMALL, TALL], dtype="int8", shift_factor=0.1)
    terms = contract.latents.quantization
    assert terms
    assert terms.scale
    assert terms.zero_point
    finer = replace(
        terms, scale=tuple(s / 2 for s in terms.scale), zero_point=terms.zero_point[::-1]
    )
    urls = [
        write(tmp_path / "one", contract, {SMALL: 9, TALL: 5}),
        write(tmp_path / "other", with_latents(contract, quantization=finer), {SMALL: 6, TALL: 7}),
    ]
    rows = read_rows(Path(urls[0])) | read_rows(Path(urls[1]))
    seen = []
    for batch in load(dict.fromkeys(urls, 1), dtype=torch.float32, tail="short"):
        assert_stored(batch, rows)
        seen += identities(batch)
    for batch in load(dict.fromkeys(urls, 1), dtype=torch.float32, normalize=True):
        for identity, latent in zip(identities(batch), batch.latents, strict=True):
            exact = torch.from_numpy(normalized(Path(urls[0]), rows[identity].latent))
            assert torch.allclose(latent.double(), exact, rtol=1e-6, atol=1e-6)
    assert {identity[0] for identity in seen} == {identity[0] for identity in rows}


def test_each_mixed_dataset_may_have_its_own_manifest(tmp_path: Path) -> None:
    contract = makers.make_contract(buckets=(SMALL,))
    latents = {SMALL: makers.make_latents(contract, SMALL, 8)}
    makers.write_dataset(tmp_path / "old", contract, {"a.tar": latents})
    makers.write_dataset(tmp_path / "old", contract, {"b.tar": latents})
    makers.write_dataset(tmp_path / "new", contract, {"c.tar": latents})
    old, new = (str(tmp_path / name / "out") for name in ("old", "new"))
    assert load({old: 1, new: 1}).num_rows == 24
    loader = load({old: 1, new: 1}, manifest={old: 1})
    assert loader.num_rows == 16
    assert loader.state_dict()["manifest"] == [1, 1]
    with pytest.raises(ConfigError, match=r"manifest must be \{url: number\}"):
        load({old: 1, new: 1}, manifest=1)
    with pytest.raises(ConfigError, match="manifest names elsewhere"):
        load({old: 1, new: 1}, manifest={"elsewhere": 1})
    with pytest.raises(DatasetError, match=f"{new} has no manifest 2"):
        load({old: 1, new: 1}, manifest={new: 2})


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_invalid_weights_are_rejected(tmp_path: Path, weight: float) -> None:
    contract = make_contract([SMALL])
    urls = [write(tmp_path / name, contract, {SMALL: 8}) for name in ("one", "other")]
    with pytest.raises(ConfigError, match=r"weights are .*: each must be above 0"):
        load({urls[0]: 1, urls[1]: weight})


def test_a_dataset_without_rows_has_no_share(tmp_path: Path) -> None:
    contract = make_contract([SMALL])
    one, empty = write(tmp_path / "one", contract, {SMALL: 8}), str(tmp_path / "two")
    write_dataset(empty, contract, [{}])
    with pytest.raises(DatasetError, match=f"{empty} has no rows"):
        load({one: 1, empty: 1})


def test_state_of_other_weights_is_rejected(tmp_path: Path) -> None:
    contract = make_contract([SMALL])
    urls = [write(tmp_path / name, contract, {SMALL: 8}) for name in ("one", "other")]
    state = load(dict.fromkeys(urls, 1)).state_dict()
    with pytest.raises(ConfigError, match="weights"):
        load({urls[0]: 1, urls[1]: 2}).load_state_dict(state)
    load(dict.fromkeys(urls, 1)).load_state_dict(state)
