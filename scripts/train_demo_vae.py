"""Train the demo VAE of the package, on pictures that the package draws.

    python scripts/train_demo_vae.py src/latentcache/demo/weights

Writes `config.json` and `diffusion_pytorch_model.safetensors` in the diffusers layout. Two CPU
cores take about half an hour. The result is reproducible on one machine with one thread count;
elsewhere floats are summed in another order. The loss is the mean squared error of [-1, 1] pixels,
plus a small L1 term for edges and a small KL divergence that fixes the scale of the latents.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from latentcache.demo.draw import draw_image
from latentcache.vae.architecture import Architecture
from latentcache.vae.model import KLAutoencoder, to_uint8

ARCHITECTURE = Architecture(
    block_out_channels=(16, 32, 48, 64),
    layers_per_block=1,
    latent_channels=16,
    norm_num_groups=8,
    mid_block_add_attention=False,
    force_upcast=False,
)
PICTURE_PX = 256
# Most crops are small, so that a batch has many different ones. Some are larger, because the
# statistics of GroupNorm depend on the size. All batches have the same number of pixels.
CROP_SIDES_PX = (64, 64, 64, 128)
BATCH_PIXELS = 32 * 64 * 64
L1_WEIGHT = 0.1
KL_WEIGHT = 1e-4  # per latent element, while the loss is per pixel
EMA_DECAY = 0.998


def draw_pool(num_images: int, seed: int) -> Tensor:
    """Return drawn pictures, uint8 [N, 3, PICTURE_PX, PICTURE_PX]."""
    rng = np.random.default_rng(seed)
    pool = np.stack([draw_image(rng, PICTURE_PX, PICTURE_PX)[0] for _ in range(num_images)])
    return torch.from_numpy(pool).permute(0, 3, 1, 2).contiguous()


def batches(pool: Tensor, seed: int) -> Iterator[Tensor]:
    """Yield batches of random crops forever, float32 [B, 3, side, side] in [-1, 1]."""
    rng = np.random.default_rng(seed)
    while True:
        for side_px in CROP_SIDES_PX:
            crops = []
            for _ in range(BATCH_PIXELS // side_px**2):
                top, left = rng.integers(0, PICTURE_PX - side_px + 1, 2)
                crop = pool[rng.integers(len(pool)), :, top : top + side_px, left : left + side_px]
                crops.append(crop.flip(-1) if rng.random() < 0.5 else crop)
            yield torch.stack(crops).float() / 127.5 - 1.0


def reconstruct(vae: KLAutoencoder, images: Tensor, noise: torch.Generator) -> tuple[Tensor, ...]:
    """Encode, sample and decode with gradients; return (reconstruction, mean, logvar), float32."""
    assert vae.decoder is not None
    mean, logvar = vae.quant_conv(vae.encoder(images)).float().chunk(2, dim=1)
    logvar = logvar.clamp(-30.0, 20.0)
    latents = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=noise)
    return vae.decoder(vae.post_quant_conv(latents)).float(), mean, logvar


def train(num_steps: int, pool: Tensor, seed: int, peak_lr: float) -> KLAutoencoder:
    """Train from random weights; return the moving average of the weights."""
    torch.manual_seed(seed)
    vae = KLAutoencoder(ARCHITECTURE)
    average = copy.deepcopy(vae).requires_grad_(False).eval()
    optimizer = torch.optim.Adam(vae.parameters(), betas=(0.9, 0.99))
    noise = torch.Generator().manual_seed(seed)
    started_s = time.monotonic()
    recent_mse = 0.0
    for step, images in zip(range(num_steps), batches(pool, seed), strict=False):
        lr = peak_lr * min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / num_steps))
        for group in optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast("cpu", torch.bfloat16):
            decoded, mean, logvar = reconstruct(vae, images, noise)
        mse = F.mse_loss(decoded, images)
        kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
        loss = mse + L1_WEIGHT * F.l1_loss(decoded, images) + KL_WEIGHT * kl
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 0.5)
        optimizer.step()
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        for kept, new in zip(average.parameters(), vae.parameters(), strict=True):
            kept.lerp_(new.detach(), 1 - decay)
        recent_mse += (mse.item() - recent_mse) / min(step + 1, 100)
        if (step + 1) % 100 == 0:
            print(
                f"step {step + 1}/{num_steps}  {time.monotonic() - started_s:.0f} s  "
                f"psnr {10 * math.log10(4 / recent_mse):.2f} dB  kl {kl.item():.2f}  "
                f"mean std {mean.std().item():.2f}  logvar {logvar.mean().item():.1f}",
                flush=True,
            )
    return average


@torch.inference_mode()
def evaluate(vae: KLAutoencoder, images: Tensor) -> tuple[float, float]:
    """Return the mean PSNR in dB of uint8 images, and the standard deviation of their latents."""
    num_latents, psnrs_db, total, total_square = 0, [], 0.0, 0.0
    for i in range(len(images)):
        image = images[i : i + 1]
        mean = vae.encode(image).chunk(2, dim=1)[0]
        decoded = to_uint8(vae.decode(mean))
        mse = (decoded.double() - image.double()).square().mean().item()
        psnrs_db.append(10 * math.log10(255**2 / max(mse, 1e-9)))
        num_latents += mean.numel()
        total += mean.sum().item()
        total_square += mean.square().sum().item()
    variance = total_square / num_latents - (total / num_latents) ** 2
    return sum(psnrs_db) / len(psnrs_db), math.sqrt(variance)


def save(vae: KLAutoencoder, scaling_factor: float, folder: Path) -> None:
    """Write the diffusers layout, with float16 weights."""
    fields = asdict(vae.architecture) | {"scaling_factor": scaling_factor}
    num_blocks = len(vae.architecture.block_out_channels)
    config = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "in_channels": 3,
        "out_channels": 3,
        "sample_size": PICTURE_PX,
        "down_block_types": ["DownEncoderBlock2D"] * num_blocks,
        "up_block_types": ["UpDecoderBlock2D"] * num_blocks,
    }
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config | fields, indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n")
    tensors = {name: tensor.half().contiguous() for name, tensor in vae.state_dict().items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def main() -> None:
    """Parse the arguments, train, measure on other pictures, and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where to write the model")
    parser.add_argument("--num-steps", type=int, default=6000)
    parser.add_argument("--num-images", type=int, default=3000)
    parser.add_argument("--peak-lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    pool = draw_pool(args.num_images, args.seed)
    print(f"drew {len(pool)} pictures", flush=True)
    vae = train(args.num_steps, pool, args.seed, args.peak_lr).half().float()  # as stored
    psnr_db, std = evaluate(vae, draw_pool(200, args.seed + 1))
    save(vae, round(1 / std, 4), args.folder)
    print(
        f"{psnr_db:.2f} dB on 200 other pictures; latent deviation {std:.4f}; wrote {args.folder}"
    )


if __name__ == "__main__":
    main()
