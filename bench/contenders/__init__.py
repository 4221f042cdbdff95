"""Programs that turn shards of photographs into stored latents, for bench/run.py.

All read the same tars, bring each photograph to 256 × 256 px, encode with the demo VAE or with an
encoder that costs nothing, and write float16 latents to the local disk. Run one as
`python -m contenders.<name> SHARDS OUT ENCODER SETTINGS`; it prints the output of `tell`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

RESOLUTION_PX = 256

BENCH = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Asked:
    """The task of a contender; `encoder` is `demo` or `free`, and `settings` are its own."""

    shards: Path
    out: Path
    encoder: str
    settings: dict[str, Any]

    @classmethod
    def of_command_line(cls) -> Asked:
        """Parse the command line."""
        shards, out, encoder, settings = sys.argv[1:]
        return cls(Path(shards), Path(out), encoder, json.loads(settings))


def tell(num_images: int, began: float, ended: float) -> None:
    """Print the result: the images, and the start and end of the work in seconds since 1970."""
    print(json.dumps({"num_images": num_images, "began": began, "ended": ended}))


def run(name: str, asked: Asked) -> dict[str, float]:
    """Run a contender in its own process.

    Returns:
        `num_images`; `total_s`, from the start of the process to its end; and `working_s`, from the
        first image to the last, without imports, loading the model and starting processes.
    """
    path = os.pathsep.join([str(BENCH), *filter(None, [os.environ.get("PYTHONPATH")])])
    offline = {"HF_HUB_OFFLINE": "1", "DIFFUSERS_OFFLINE": "1"}
    settings = json.dumps(asked.settings)
    began = time.perf_counter()
    done = subprocess.run(
        [
            *(sys.executable, "-m", f"contenders.{name}"),
            *(str(asked.shards), str(asked.out), asked.encoder, settings),
        ],
        env={**os.environ, **offline, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    total_s = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"contenders.{name} failed:\n{done.stderr[-2000:]}")
    report = json.loads(done.stdout.splitlines()[-1])
    return {
        "num_images": report["num_images"],
        "total_s": total_s,
        "working_s": report["ended"] - report["began"],
    }


def free_moments(images: torch.Tensor) -> torch.Tensor:
    """Return moments of the demo VAE's shape in float32 for images [B, 3, H, W].

    The cost is close to zero, so that the cost of everything else shows.
    """
    return images[:, :1, ::8, ::8].float().repeat(1, 32, 1, 1)


def load_peer(encoder: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Load diffusers with default settings; return a function from [B, 3, H, W] to the mean."""
    if encoder == "free":
        return lambda images: free_moments(images).chunk(2, dim=1)[0]
    from diffusers import AutoencoderKL

    import latentcache.vae

    folder = Path(latentcache.vae.__path__[0]) / "demo"
    vae = AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False).eval()

    @torch.inference_mode()
    def encode(images: torch.Tensor) -> torch.Tensor:
        mean: torch.Tensor = vae.encode(images).latent_dist.mean
        return mean

    return encode
