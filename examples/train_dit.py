"""Train a tiny diffusion transformer on a latent dataset, on CPUs, with exact resume.

    make demo
    python examples/train_dit.py demo/latents --out demo/dit --vae demo

The same command resumes from the newest checkpoint in `--out`, also after a kill. `torchrun
--nproc-per-node 2 examples/train_dit.py …` trains on the same global batches with the same noise,
with any number of processes. `log.jsonl` has a line for each step, with a hash of the keys of the
batch. A process that is stopped and resumed writes the same lines as one that is not.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, TextIO

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import latentcache

PATCH = 2
PEAK_LR = 2e-3
WARMUP_STEPS = 50
EMA_DECAY = 0.99  # for a few hundred steps; long trainings use 0.9999
REPORT_STEPS = 50
KEPT_CHECKPOINTS = 2
SAMPLING_STEPS = 30
NUM_PICTURES = 6


def waves(values: Tensor, width: int) -> Tensor:
    """Return sines and cosines at frequencies from 1 to 1/10,000: [...] to [..., width]."""
    frequencies = 1e-4 ** torch.linspace(0, 1, width // 2)
    angles = values[..., None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def positions(height: int, width: int, channels: int) -> Tensor:
    """Return encodings of grid positions, [height * width, channels]: half row, half column."""
    rows = waves(torch.arange(height), channels // 2)[:, None].expand(-1, width, -1)
    columns = waves(torch.arange(width), channels // 2)[None].expand(height, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


def make_zero(layer: nn.Linear) -> nn.Linear:
    """Set the weights and the bias of a layer to 0."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Block(nn.Module):
    """A transformer block that the condition scales, shifts and gates; initially the identity.

    x [b, n, width], condition [b, width] to [b, n, width]. This is adaLN-zero: Peebles and Xie,
    "Scalable Diffusion Models with Transformers", 2022.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.attend = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width)
        )
        self.modulation = make_zero(nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """See the class."""
        of_attend, of_mlp = self.modulation(condition)[:, None].chunk(2, dim=-1)
        shift, scale, gate = of_attend.chunk(3, dim=-1)
        y = self.norm(x) * (1 + scale) + shift
        x = x + gate * self.attend(y, y, y, need_weights=False)[0]
        shift, scale, gate = of_mlp.chunk(3, dim=-1)
        out: Tensor = x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)
        return out


class DiT(nn.Module):
    """A network that predicts the velocity from latents to noise, for latents of any size.

    Args:
        channels: of the latents.
        width: of the transformer.
        depth: its blocks.
        num_heads: of its attention.
    """

    def __init__(self, channels: int, width: int = 128, depth: int = 4, num_heads: int = 4) -> None:
        super().__init__()
        self.width = width
        self.embed = nn.Linear(channels * PATCH**2, width)
        self.condition = nn.Sequential(
            nn.Linear(7 * width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.out = make_zero(nn.Linear(width, channels * PATCH**2))

    def forward(self, x: Tensor, t: Tensor, time_ids: Tensor) -> Tensor:
        """Predict noise - latents, [b, C, h, w].

        Args:
            x: [b, C, h, w], (1 - t) of latents and t of noise.
            t: [b] in [0, 1].
            time_ids: [b, 6], the sizes and crops of `Batch.time_ids`. A model that knows them does
                not learn to draw what was cut off.
        """
        height, width = x.shape[2:]
        patches = F.pixel_unshuffle(F.pad(x, (0, -width % PATCH, 0, -height % PATCH)), PATCH)
        rows, columns = patches.shape[2:]
        x = self.embed(patches.flatten(2).transpose(1, 2)) + positions(rows, columns, self.width)
        numbers = torch.cat([1000 * t[:, None], time_ids], dim=1)
        condition = self.condition(waves(numbers, self.width).flatten(1))
        for block in self.blocks:
            x = block(x, condition)
        patches = self.out(self.norm(x)).transpose(1, 2).unflatten(2, (rows, columns))
        return F.pixel_shuffle(patches, PATCH)[:, :, :height, :width]


def draw_noise(batch: latentcache.Batch, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Draw times [b] and noise [b, C, h, w] for a batch.

    Each step has its own generator. Every rank draws for the whole global batch and uses its slice,
    so there is no state to save, and the result does not depend on the number of ranks.
    """
    rng = np.random.default_rng((seed, step))
    num_rows = dist.get_world_size() * len(batch)
    first = dist.get_rank() * len(batch)
    times = torch.from_numpy(rng.standard_normal(num_rows, np.float32)).sigmoid()
    noise = torch.from_numpy(rng.standard_normal((num_rows, *batch.latents.shape[1:]), np.float32))
    return times[first : first + len(batch)], noise[first : first + len(batch)]


def flow_loss(model: nn.Module, batch: latentcache.Batch, t: Tensor, noise: Tensor) -> Tensor:
    """Return the squared error of the velocity along the straight line from latents to noise.

    Liu et al., "Flow Straight and Fast", 2022; times from a logit-normal distribution: Esser et
    al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", 2024.
    """
    part = t[:, None, None, None]
    velocity = model((1 - part) * batch.latents + part * noise, t, batch.time_ids)
    return F.mse_loss(velocity, noise - batch.latents)


def describe(batch: latentcache.Batch, loss: Tensor) -> dict[str, Any]:
    """Return the log entry of a step over all ranks: the mean loss and a hash of the rows."""
    mine = (loss.item(), list(zip(batch.columns["unit"], batch.columns["key"], strict=True)))
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    keys = json.dumps([row for _, rows in ranks for row in rows])
    return {
        "epoch": batch.epoch,
        "bucket": batch.bucket,
        "loss": fmean(loss for loss, _ in ranks),
        "keys": hashlib.sha256(keys.encode()).hexdigest()[:16],
    }


@dataclass(slots=True)
class Training:
    """The state that a checkpoint holds; `step` counts the completed steps."""

    model: DiT
    average: AveragedModel
    optimizer: torch.optim.Optimizer
    loader: latentcache.LatentLoader
    step: int = 0

    @property
    def parts(self) -> dict[str, Any]:
        """The objects that have a state."""
        return {
            "model": self.model,
            "average": self.average,
            "optimizer": self.optimizer,
            "loader": self.loader,
        }

    def update(self, loss: Tensor) -> None:
        """Apply one optimizer step."""
        self.step += 1
        for group in self.optimizer.param_groups:
            group["lr"] = PEAK_LR * min(1.0, self.step / WARMUP_STEPS)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.average.update_parameters(self.model)

    def save(self, folder: Path) -> None:
        """Write a checkpoint atomically, and delete old ones."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        unfinished = folder / "checkpoint.part"
        with unfinished.open("wb") as file:
            torch.save({"step": self.step, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(folder / f"step-{self.step:08d}.pt")
        for old in sorted(folder.glob("step-*.pt"))[:-KEPT_CHECKPOINTS]:
            old.unlink()


def start(args: argparse.Namespace) -> Training:
    """Start a training, or resume from the newest checkpoint."""
    newest = max(args.out.glob("step-*.pt"), default=None)
    saved = torch.load(newest) if newest else None
    loader = latentcache.LatentLoader(
        args.dataset,
        batch_size=args.batch_size,
        seed=args.seed,
        columns=["unit", "key"],  # for the log
        # The dataset may have grown; this training continues with its original rows.
        manifest=saved["loader"]["manifest"] if saved else None,
    )
    torch.manual_seed(args.seed)
    model = DiT(loader.contract.vae.latent_channels)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))  # type: ignore[no-untyped-call]
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    training = Training(model, average, optimizer, loader)
    if saved:
        training.step = saved["step"]
        for name, part in training.parts.items():
            part.load_state_dict(saved[name])
    return training


def open_log(folder: Path, num_steps: int) -> TextIO:
    """Open the log after the lines of saved steps: a killed process may have logged later ones."""
    path = folder / "log.jsonl" if dist.get_rank() == 0 else Path(os.devnull)
    lines = path.read_text().splitlines(keepends=True)[:num_steps] if num_steps else []
    path.write_text("".join(lines))
    return path.open("a")


def epochs(loader: latentcache.LatentLoader) -> Iterator[latentcache.Batch]:
    """Yield the batches of all epochs, one epoch after another."""
    while True:
        yield from loader


def train(training: Training, args: argparse.Namespace, log: TextIO) -> None:
    """Train for `args.steps` steps; the first rank logs and saves."""
    is_first = dist.get_rank() == 0
    if is_first:
        print(f"{len(training.loader)} steps an epoch; {training.step} of {args.steps} are done")
    parallel = DistributedDataParallel(training.model)
    batches = epochs(training.loader)
    losses: list[float] = []
    started_s = time.monotonic()
    while training.step < args.steps:
        batch = next(batches)
        loss = flow_loss(parallel, batch, *draw_noise(batch, args.seed, training.step))
        training.update(loss)
        line = describe(batch, loss) | {"step": training.step}
        print(json.dumps(line), file=log, flush=True)
        losses.append(line["loss"])
        is_last = training.step == args.steps
        if is_first and (is_last or training.step % REPORT_STEPS == 0):
            seconds = time.monotonic() - started_s
            print(f"step {training.step}: loss {fmean(losses):.3f}, {seconds:.0f} s", flush=True)
            losses.clear()
        if is_first and (is_last or training.step % args.save_every == 0):
            training.save(args.out)


@torch.inference_mode()
def draw(training: Training, args: argparse.Namespace) -> Image.Image:
    """Draw dataset images, the same images denoised from half noise, and generated images."""
    loader = latentcache.LatentLoader(
        args.dataset, batch_size=NUM_PICTURES, seed=args.seed, tail="pad", rank=0, world_size=1
    )
    batch = next(iter(loader))
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(args.seed))
    half = generate(training.average, batch, 0.5 * (batch.latents + noise), 0.5)
    latents = torch.cat([batch.latents, half, generate(training.average, batch, noise, 1.0)])
    decoded = latentcache.load_vae(args.vae).decode(loader.denormalize(latents))
    rows = latentcache.to_uint8(decoded).permute(0, 2, 3, 1).chunk(3)
    return Image.fromarray(torch.cat([torch.cat([*row], dim=1) for row in rows]).numpy())


def generate(model: nn.Module, like: latentcache.Batch, x: Tensor, start: float) -> Tensor:
    """Integrate the velocity from x at time `start` to latents [b, C, h, w], without crops."""
    uncut = torch.cat([like.target_size, 0 * like.crop_top_left, like.target_size], dim=1)
    times = torch.linspace(start, 0, round(start * SAMPLING_STEPS) + 1)
    for t, until in itertools.pairwise(times):
        x = x + (until - t) * model(x, t.expand(len(x)), uncut)
    return x


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the arguments, train, and draw."""
    parser = argparse.ArgumentParser(description="Train a tiny diffusion transformer.")
    parser.add_argument("dataset", help="URL of a latent dataset")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and log")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=8, help="of all processes together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--vae", help="draw samples.png at the end, decoded with this; or `demo`")
    args = parser.parse_args(argv)

    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {error.filename}: {error.strerror}")
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    else:  # a single process is a group too, so that the code has one path
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        training = start(args)
        with open_log(args.out, training.step) as log:
            train(training, args, log)
        if args.vae and dist.get_rank() == 0:
            draw(training, args).save(args.out / "samples.png")
            print(f"drew {args.out}/samples.png: the dataset's, out of half noise, out of noise")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except latentcache.LatentCacheError as error:
        sys.exit(f"error: {error}")
