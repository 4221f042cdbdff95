"""Small shards, contracts, units and datasets for the tests to work on; nothing is encoded here."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from latentcache.dataset.bucket import Bucket
from latentcache.dataset.columns import columns_of
from latentcache.dataset.contract import (
    Contract,
    LatentContract,
    SourceContract,
    TransformContract,
    VaeContract,
    establish_contract,
)
from latentcache.dataset.manifest import Manifest
from latentcache.dataset.quantization import to_stored, to_values
from latentcache.dataset.receipts import Receipt, Unit, UnitRecord, new_attempt
from latentcache.dataset.rejects import count_reasons
from latentcache.dataset.shards import (
    BucketWriter,
    RejectRow,
    RowMeta,
    describe_file,
    write_rejects,
)
from latentcache.dataset.state import State, write_next
from latentcache.dataset.statistics import Statistics
from latentcache.metrics import psnr_db
from latentcache.qa.qa_files import QaRow, write_qa
from latentcache.storage import Store
from synthetic import make_quantization

Size = tuple[int, int]


TarMember = tuple[str, bytes]


def draw(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth picture with some noise, other for each seed."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    pixels = pixels + rng.integers(-9, 10, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encode_image(image: Image.Image, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def png(width: int, height: int, seed: int = 0) -> bytes:
    return encode_image(draw(width, height, seed))


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


def config_tree(folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A config that encodes `<folder>/src/*.tar` on the CPU into `<folder>/out`."""
    tree: dict[str, Any] = {
        "name": "test",
        "source": {"shards": f"{folder}/src/*.tar", "keep": ["txt"]},
        "transform": {"resolution_px": 64},
        "vae": {"checkpoint": "demo"},
        "output": {"url": f"{folder}/out"},
        "compute": {"num_gpus": 0},
        "rejects": {"max_rate": 1},  # a test of damaged samples has few others
    }
    for name, section in sections.items():
        tree[name] = tree.get(name, {}) | section
    return tree


def make_contract(
    *,
    buckets: Sequence[Size] = ((64, 64),),
    posterior: str = "mean",
    dtype: str = "float16",
    format: str = "parquet",
    latent_channels: int = 4,
) -> Contract:
    vae = VaeContract(
        family="kl",
        encoder_fingerprint="e" * 64,
        architecture={"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2},
        latent_channels=latent_channels,
        downsample_factor=8,
        scaling_factor=0.18215,
        shift_factor=0.0,
    )
    transform = TransformContract("center", "bicubic", tuple(buckets), None, None, 100_000_000)
    num_channels = latent_channels * (2 if posterior == "moments" else 1)
    quantization = make_quantization(num_channels) if dtype == "int8" else None
    latents = LatentContract(posterior, dtype, format, "fp32", quantization)
    return Contract(vae, transform, latents, SourceContract(("jpg", "png")))


def make_latents(contract: Contract, bucket: Size, num_rows: int, seed: int = 0) -> torch.Tensor:
    """Latents [N, C, H, W] in the stored dtype."""
    generator = torch.Generator().manual_seed(seed)
    values = 3 * torch.randn((num_rows, *contract.latent_shape(bucket)), generator=generator)
    return to_stored(values, contract.latents)[0]


def make_rows(
    num_rows: int, columns: Sequence[str] = ("caption",), first: int = 0
) -> list[RowMeta]:
    """Rows `k0000`, …; every fifth lacks its kept columns."""
    rows = []
    for index in range(first, first + num_rows):
        kept = {name: index if name == "cls" else f"{name} {index} ü" for name in columns}
        rows.append(RowMeta(f"k{index:04d}", 640, 480 + index, 0, 7, kept if index % 5 else {}))
    return rows


def make_qa_rows(contract: Contract, bucket: Size, num_rows: int, first: int = 0) -> list[QaRow]:
    """QA rows `k0000`, … of pictures and noise: the later a row, the worse its reconstruction."""
    num_channels, height, width = contract.latent_shape(bucket)
    num_channels = contract.vae.latent_channels
    rows = []
    for index in range(first, first + num_rows):
        rng = np.random.default_rng(index)
        image = np.asarray(draw(*bucket, index))
        noise = rng.normal(0, 2 + index, image.shape)
        reconstruction = (image + noise).round().clip(0, 255).astype(np.uint8)
        pair = (torch.from_numpy(p.copy()).permute(2, 0, 1)[None] for p in (reconstruction, image))
        latent = rng.normal(0, 3, (num_channels, height, width)).astype("<f4")
        rows.append(
            QaRow(
                key=f"k{index:04d}",
                bucket=Bucket(*bucket).name,
                psnr_db=float(psnr_db(*pair)),
                ssim=0.9 - index / 1000,
                lpips=None,
                drift_db=60.0,
                psnr_cost_db=None,
                image=encode_image(Image.fromarray(image)),
                reconstruction=encode_image(Image.fromarray(reconstruction)),
                latent=latent.tobytes(),
                latent_shape=latent.shape,
            )
        )
    return rows


def commit_unit(
    store: Store,
    contract: Contract,
    folder: Path,
    source: str,
    latents: Mapping[Size, torch.Tensor],
    rejects: Sequence[RejectRow] = (),
    generation: int = 0,
    qa: Sequence[QaRow] = (),
    keep: Sequence[str] = ("txt",),
) -> Receipt:
    """Write a unit's files as the engine does, upload them and put the receipt."""
    folder.mkdir(parents=True, exist_ok=True)
    unit = Unit.of(source, 1000, "v1", contract.fingerprint)
    attempt, columns = new_attempt(), columns_of(keep)
    files, first = [], 0
    for bucket, tensor in latents.items():
        stem = folder / f"{generation}-{attempt}-{Bucket(*bucket).name}"
        writer = BucketWriter(stem, contract, columns, unit.id, bucket)
        writer.append(tensor, make_rows(len(tensor), [column.name for column in columns], first))
        writer.close()
        writer.check()
        first += len(tensor)
        for local in writer.paths:
            path = f"data/{unit.id}/{local.name}"
            files.append(describe_file(local, path, len(tensor), Bucket(*bucket).name))
            store.put_file(local, path)
    rejects_file = None
    if rejects:
        local = folder / f"{generation}-{attempt}.parquet"
        write_rejects(local, rejects)
        rejects_file = describe_file(local, f"rejects/{unit.id}/{local.name}", len(rejects), "")
        store.put_file(local, rejects_file.path)
    qa_file = None
    if qa:
        local = folder / f"{generation}-{attempt}.parquet"
        qa_file = write_qa(local, f"qa/{unit.id}/{local.name}", qa, "demo")
        assert qa_file
        store.put_file(local, qa_file.file.path)
    # Some tests store what is not finite, which a receipt cannot tell.
    values = (to_values(stored, contract.latents) for stored in latents.values())
    parts = [Statistics.of(v.nan_to_num(0, 0, 0).numpy()) for v in values]
    statistics = reduce(Statistics.merge, parts, Statistics.empty(contract.stored_channels))
    record = UnitRecord(
        unit=unit,
        generation=generation,
        attempt=attempt,
        num_samples=first + len(rejects),
        num_rows=first,
        num_rejects=len(rejects),
        files=tuple(files),
        rejects=rejects_file,
        qa=qa_file,
        columns=columns,
        reject_reasons=count_reasons(rejects),
    )
    receipt = Receipt(record, contract.fingerprint, statistics)
    assert store.put_if_absent(receipt.path, receipt.to_bytes())
    return receipt


def write_dataset(
    folder: Path,
    contract: Contract,
    sources: Mapping[str, Mapping[Size, torch.Tensor]],
    rejects: Mapping[str, Sequence[RejectRow]] | None = None,
    qa: Mapping[str, Sequence[QaRow]] | None = None,
    provenance: dict[str, Any] | None = None,
    keep: Sequence[str] = ("txt",),
) -> Manifest:
    """Write a whole dataset below `<folder>/out`: one unit a source, and one manifest."""
    store = Store(str(folder / "out"))
    establish_contract(store, contract, provenance or {})
    receipts = {
        source: commit_unit(
            store,
            contract,
            folder / "staging",
            source,
            latents,
            (rejects or {}).get(source, ()),
            qa=(qa or {}).get(source, ()),
            keep=keep,
        )
        for source, latents in sources.items()
    }
    snapshot = {source: [receipt.record.unit] for source, receipt in receipts.items()}
    _, manifest = write_next(
        State(store),
        contract.fingerprint,
        contract.stored_channels,
        lambda: snapshot,
        on_missing="keep",
        columns=columns_of(keep),
    )
    assert manifest
    return manifest


def tree_digest(folder: Path) -> dict[str, str]:
    """Each file below a folder, and the hash of its bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def flip_byte(path: Path, offset: int | None = None) -> None:
    """Flip the bits of one byte, by default in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if offset is None else offset] ^= 0xFF
    path.write_bytes(data)


def tar_bytes(members: list[TarMember | tarfile.TarInfo], *, end: bool = True) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT, errors="surrogateescape"
    ) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                header = tarfile.TarInfo(member[0])
                header.size = len(member[1])
                tar.addfile(header, io.BytesIO(member[1]))
        size = tar.offset
    return buffer.getvalue() if end else buffer.getvalue()[:size]


def pair(key: str, image: bytes = b"image") -> list[TarMember]:
    return [(f"{key}.jpg", image), (f"{key}.txt", b"caption of " + key.encode(errors="replace"))]
