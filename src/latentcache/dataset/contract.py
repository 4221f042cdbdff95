"""The contract: the settings that define a dataset's latents, and their fingerprint.

Runs may write to one output only if their contracts are equal. So a contract holds nothing that may
differ between two correct runs: no times, versions or locations.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Annotated, Any

from latentcache.dataset.parse import Count, Pattern, Range, Sha256, build, check, load_json
from latentcache.errors import ContractMismatch, DatasetError, ObjectNotFound
from latentcache.storage import Store

FORMAT_VERSION = 3
CONTRACT_PATH = "contract.json"

_Pixels = Annotated[int, Range(1, 2**16)]
_Scale = Annotated[float, Range(1e-38, 3e38)]  # a normal number of float32
_ZeroPoint = Annotated[int, Range(-(2**22), 2**22)]

MAX_SAMPLE_BYTES = 256 * 2**20
"""The default of `source.max_sample_bytes`."""


def canonical_json(tree: Any) -> bytes:
    """Return the canonical JSON of a value: sorted keys, no spaces, UTF-8, no NaN."""
    style: dict[str, Any] = {"separators": (",", ":"), "ensure_ascii": False, "allow_nan": False}
    return json.dumps(tree, sort_keys=True, **style).encode()


@dataclass(frozen=True)
class SourceContract:
    """The settings that decide how a source is read as samples; docs/format.md describes them.

    `key_rules` and `text_rules` are versions of the rules that derive keys and decode text.
    """

    image_fields: tuple[str, ...]
    key_column: str | None = None
    max_sample_bytes: int = MAX_SAMPLE_BYTES
    caption_index: int = 0
    key_rules: int = 1
    text_rules: int = 1


@dataclass(frozen=True)
class VaeContract:
    """The properties of the autoencoder that decide the latents; its decoder does not."""

    family: str
    encoder_fingerprint: Sha256
    architecture: dict[str, Any]
    latent_channels: Annotated[int, Range(1, 4096)]
    downsample_factor: Annotated[int, Range(1, 4096)]
    scaling_factor: float
    shift_factor: float
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    pixel_range: tuple[int, int] = (-1, 1)


@dataclass(frozen=True)
class TransformContract:
    """The transform of a decoded image to the pixels that are encoded."""

    crop: str
    resample: str
    buckets: tuple[tuple[_Pixels, _Pixels], ...]
    min_side_px: Count | None
    max_upscale: float | None
    max_pixels: Count
    dct_scaling: bool = False


@dataclass(frozen=True)
class QuantizationContract:
    """The quantization of int8 latents; `dataset/quantization.py` has the arithmetic.

    `num_images` and `seed` specify the calibration: how many images it uses, and which ones. Its
    result, `scale` and `zero_point`, has a value per stored channel; None before the first run.
    """

    num_images: Count
    seed: int
    scale: tuple[_Scale, ...] | None = None
    zero_point: tuple[_ZeroPoint, ...] | None = None


@dataclass(frozen=True)
class LatentContract:
    """The settings that decide how a latent is drawn from the posterior and stored.

    Latents are always stored unscaled. `precision` may be `auto` until the first run has resolved
    it. `quantization` is set if and only if `dtype` is int8.
    """

    posterior: Annotated[str, Pattern("mean|moments|sample")]
    dtype: Annotated[str, Pattern("float16|bfloat16|float32|int8")]
    format: Annotated[str, Pattern("parquet|safetensors")]
    precision: Annotated[str, Pattern("auto|fp32|fp16|bf16")]
    quantization: QuantizationContract | None = None


@dataclass(frozen=True)
class Contract:
    """All settings that must agree between the runs that fill one dataset.

    The kept columns are not part of it: see `dataset/columns.py`.
    """

    vae: VaeContract
    transform: TransformContract
    latents: LatentContract
    source: SourceContract
    format_version: int = FORMAT_VERSION

    @property
    def stored_channels(self) -> int:
        """The number of channels of a stored latent: C, or 2C for moments (mean, log-variance)."""
        return self.vae.latent_channels * (2 if self.latents.posterior == "moments" else 1)

    def latent_shape(self, bucket: tuple[int, int]) -> tuple[int, int, int]:
        """Return the shape [C, H, W] of a stored latent of a bucket (width, height) in pixels."""
        width_px, height_px = bucket
        factor = self.vae.downsample_factor
        return self.stored_channels, height_px // factor, width_px // factor

    @property
    def is_resolved(self) -> bool:
        """Whether every field that is measured on real images has a value."""
        spec = self.latents.quantization
        return self.latents.precision != "auto" and (spec is None or spec.scale is not None)

    def resolved_as(self, other: Contract) -> Contract:
        """Return this contract, with `precision` and quantization, if open, of another contract."""
        mine, theirs = self.latents, other.latents
        if mine.precision == "auto":
            mine = replace(mine, precision=theirs.precision)
        spec, measured = mine.quantization, theirs.quantization
        if spec and spec.scale is None and measured:
            spec = replace(spec, scale=measured.scale, zero_point=measured.zero_point)
            mine = replace(mine, quantization=spec)
        return replace(self, latents=mine)

    def to_json(self) -> dict[str, Any]:
        """Return the contract as plain JSON; only int8 latents have the field `quantization`."""
        tree: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        if self.latents.quantization is None:
            del tree["latents"]["quantization"]
        return tree

    @classmethod
    def from_json(cls, tree: Any) -> Contract:
        """Build a contract from the result of `to_json`; raise `DatasetError` if it is another."""
        try:
            require_format(tree, "contract.json")
            contract = build(cls, tree)
            _require_sound(contract)
            return contract
        except ValueError as error:
            raise DatasetError(f"contract.json is damaged: {error}") from error

    @cached_property
    def fingerprint(self) -> str:
        """The SHA-256 of the contract's canonical JSON, in hex."""
        return hashlib.sha256(canonical_json(self.to_json())).hexdigest()


def require_format(tree: Any, where: str) -> None:
    """Raise `DatasetError` unless parsed JSON has this release's format version.

    Args:
        tree, where: the parsed JSON, and the name or URL of the file for the message.
    """
    version = tree.get("format_version") if isinstance(tree, dict) else None
    if version is None:
        raise DatasetError(f"{where} is damaged: it has no `format_version`")
    if version != FORMAT_VERSION or isinstance(version, bool | float):
        raise DatasetError(
            f"{where} has format version {version!r:.20}; this latentcache reads "
            f"{FORMAT_VERSION}: install the release that wrote it"
        )


def _require_sound(contract: Contract) -> None:
    """Raise `ValueError` if fields of a contract contradict each other."""
    vae, latents = contract.vae, contract.latents
    quantization = latents.quantization
    for values in (vae.latents_mean, vae.latents_std):
        if values is not None and len(values) != vae.latent_channels:
            raise ValueError(
                f"vae has {len(values)} means or deviations, not {vae.latent_channels}"
            )
    if not vae.scaling_factor or not all(vae.latents_std or (1.0,)):
        raise ValueError("vae.scaling_factor or latents_std is 0")
    for bucket in contract.transform.buckets:
        if any(side % vae.downsample_factor for side in bucket):
            raise ValueError(f"bucket {bucket} is not a multiple of {vae.downsample_factor} pixels")
    if (quantization is None) != (latents.dtype != "int8"):
        raise ValueError("latents.quantization must be set if, and only if, latents.dtype is int8")
    if quantization:
        pair = quantization.scale, quantization.zero_point
        if any(part is not None and len(part) != contract.stored_channels for part in pair):
            raise ValueError(f"latents.quantization needs {contract.stored_channels} values each")


def contract_diff(
    before: Contract, after: Contract, names: tuple[str, str] = ("dataset", "config")
) -> list[str]:
    """Return one line for each field that differs between two contracts.

    Args:
        before, after, names: the contracts, and their owners for `vae.family: dataset has …`.
    """
    old, new = dict(_leaves(before.to_json())), dict(_leaves(after.to_json()))
    paths = old.keys() | new.keys()
    if before.latents.dtype != after.latents.dtype:  # the line on dtype implies these
        paths = {path for path in paths if not path.startswith("latents.quantization.")}
    return [
        f"{path}: {names[0]} has {json.dumps(old.get(path))}, "
        f"{names[1]} has {json.dumps(new.get(path))}"
        for path in sorted(paths)
        if old.get(path) != new.get(path)
    ]


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def read_contract(store: Store) -> Contract | None:
    """Return the contract of a dataset, or None if it does not exist yet."""
    try:
        data = store.read_bytes(CONTRACT_PATH)
    except ObjectNotFound:
        return None
    return _parse(store, data)[0]


def require_contract(store: Store) -> Contract:
    """Return the contract of a dataset; raise `DatasetError` if it has none."""
    if contract := read_contract(store):
        return contract
    raise DatasetError(f"{store.url} is not a latent dataset: it has no contract.json")


def read_provenance(store: Store) -> dict[str, Any]:
    """Return the provenance in a dataset's contract file: its name, checkpoint URL and versions.

    These are the writer's claims, which nothing verifies: show them, but do not open their URLs.
    """
    _, provenance = _parse(store, store.read_bytes(CONTRACT_PATH))
    if not isinstance(provenance, dict):
        raise DatasetError(f"{store.url_of(CONTRACT_PATH)} is damaged: it has no provenance")
    return provenance


def _parse(store: Store, data: bytes) -> tuple[Contract, Any]:
    """Return the contract in a contract file, and the provenance as it is."""
    url = store.url_of(CONTRACT_PATH)
    try:
        tree = check(dict[str, Any], load_json(data), "it")
        contract = Contract.from_json(tree.get("contract"))
    except ValueError as error:
        raise DatasetError(f"{url} is not a contract: {error}") from error
    if tree.get("fingerprint") != contract.fingerprint:
        raise DatasetError(f"{url} was edited: its fingerprint does not match its fields")
    return contract, tree.get("provenance")


def establish_contract(store: Store, contract: Contract, provenance: dict[str, Any]) -> bytes:
    """Put the contract if the output has none, else compare; return the bytes of contract.json.

    Args:
        store, contract: the output, and this run's contract, resolved.
        provenance: information that may differ between runs: checkpoint URL, versions.
    """
    assert contract.is_resolved
    tree = {"contract": contract.to_json(), "fingerprint": contract.fingerprint}
    data = json.dumps(tree | {"provenance": provenance}, indent=1, sort_keys=True).encode()
    if not store.put_if_absent(CONTRACT_PATH, data):
        data = store.read_bytes(CONTRACT_PATH)
    require_same(store, _parse(store, data)[0], contract)
    return data


def require_same(store: Store, stored: Contract, contract: Contract) -> None:
    """Raise `ContractMismatch`, which names each field, if two contracts differ.

    Args:
        store, stored, contract: the output, the contract in it, and that of the config.
    """
    if stored.fingerprint == contract.fingerprint:
        return
    fix = "use another `output.url`"
    if not store.list("commits"):
        fix = f"delete {store.url_of(CONTRACT_PATH)} to start over, as nothing is committed yet"
    raise ContractMismatch(
        f"{store.url} was created with different settings: {fix}, or change the config to match "
        "the dataset:",
        *(f"  {line}" for line in contract_diff(stored, contract)),
    )
