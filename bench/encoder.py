"""Measure the encoder alone: diffusers against ours, and on a GPU against the limits of the GPU.

`python bench/encoder.py`; `make bench` runs it too. On a GPU: a KL-f8 of the published size with
random weights at 256, 512 and 1024 px, with images/s, the share of the measured matrix rate, the
drift from fp32, the bandwidth of the norm, attention, and the time of each kernel. On a CPU: the
demo VAE and the published size at 256 px. diffusers gets its images as [-1, 1] in the precision and
on the device; ours starts from uint8 there. Without diffusers, its rows say so.

It writes bench/results/encoder.json part by part, so that an interrupted run keeps its results.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import latentcache
from harness import print_table, take_turns, write_results
from latentcache.demo.draw import draw_image
from latentcache.metrics import drift_db
from latentcache.vae import plain
from latentcache.vae.architecture import Architecture
from latentcache.vae.encoder import PRECISION_DTYPES, require_fp32
from latentcache.vae.fast import FastEncoder, fastest_encode
from latentcache.vae.model import KLAutoencoder

HAS_DIFFUSERS = importlib.util.find_spec("diffusers") is not None
PACKAGES = ["diffusers"] if HAS_DIFFUSERS else []
KL_F8: dict[str, Any] = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}

# Twice the multiply-adds of the encoder's convolutions, linear layers and attention.
TERAFLOP_PER_IMAGE = {256: 0.273, 512: 1.117, 1024: 4.879}

Contenders = dict[str, Callable[[], object]]


def make_kl_f8(device: str) -> KLAutoencoder:
    """Return a VAE of the published size with random weights: a checkpoint may be missing."""
    torch.manual_seed(0)
    vae = KLAutoencoder(Architecture(**KL_F8), decoder=False)
    return vae.eval().requires_grad_(False).to(device)


def draw_images(num: int, side_px: int, device: str) -> Tensor:
    """Return drawn pictures, uint8 [num, 3, side, side]."""
    rng = np.random.default_rng(1)
    drawn = [torch.from_numpy(draw_image(rng, side_px, side_px)[0].copy()) for _ in range(num)]
    return torch.stack(drawn).permute(0, 3, 1, 2).contiguous().to(device)


def diffusers_encode(
    vae: KLAutoencoder, dtype: torch.dtype, *, channels_last: bool, compiled: bool = False
) -> Callable[[Tensor], Tensor]:
    """Return the encoder of diffusers with the same weights, for images in [-1, 1]."""
    from diffusers import AutoencoderKL

    fields = vae.architecture.encoder_fields
    num_blocks = len(fields["block_out_channels"])
    theirs = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * num_blocks,
        up_block_types=["UpDecoderBlock2D"] * num_blocks,
        **fields,
    )
    theirs.load_state_dict(
        {name: value for name, value in vae.state_dict().items() if "decoder" not in name},
        strict=False,
    )
    del theirs.decoder
    # Their own `to` warns of modules to keep in float32, although there are none.
    theirs = torch.nn.Module.to(theirs.eval().requires_grad_(False), vae.device, dtype)
    if channels_last:
        theirs = theirs.to(memory_format=torch.channels_last)
    if compiled:
        theirs.encoder.compile(dynamic=False)

    def encode(images: Tensor) -> Tensor:
        moments: Tensor = theirs.encode(images).latent_dist.parameters
        return moments

    return encode


def as_floats(images: Tensor, dtype: torch.dtype, *, channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return (images.float() / 127.5 - 1).to(dtype).contiguous(memory_format=layout)


# On a GPU.


def seconds_on_gpu(work: Callable[[], object]) -> float:
    """Return the median time by events, of as many rounds as fit into 0.3 s, at least three."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    times: list[float] = []
    deadline = time.perf_counter() + 0.3
    while len(times) < 3 or (time.perf_counter() < deadline and len(times) < 50):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        began.record()
        work()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) / 1e3)
    return statistics.median(times)


def measure_ceilings() -> dict[str, float]:
    """Measure the limits of this GPU: TFLOP/s of a large product, TB/s of a large copy."""
    figures = {}
    for precision in ("fp16", "bf16"):
        a, b = (
            torch.randn((8192, 8192), device="cuda").to(PRECISION_DTYPES[precision]) for _ in "ab"
        )
        figures[precision] = 2 * 8192**3 / seconds_on_gpu(lambda: a @ b) / 1e12  # noqa: B023
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    figures["copy"] = 2 * 2**31 / seconds_on_gpu(lambda: target.copy_(source)) / 1e12
    print(f"ceilings: {', '.join(f'{name} {value:.3g}' for name, value in figures.items())}")
    return {name: round(value, 3) for name, value in figures.items()}


def as_graph(encode: Callable[[Tensor], Tensor], images: Tensor) -> Callable[[], object]:
    """Capture the kernels in a CUDA graph, because small batches wait for kernel launches."""
    for _ in range(3):
        encode(images)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        encode(images)
    return graph.replay


def gpu_contenders(vae: KLAutoencoder, precision: str, images: Tensor) -> dict[str, Any]:
    """Return a factory for each contender. Create one at a time, because memory may be short."""
    dtype = PRECISION_DTYPES[precision]
    makers: dict[str, Any] = {}
    for name, channels_last in (("diffusers", False), ("diffusers, channels_last", True)):
        if HAS_DIFFUSERS:
            makers[name] = lambda channels_last=channels_last: functools.partial(
                diffusers_encode(vae, dtype, channels_last=channels_last),
                as_floats(images, dtype, channels_last=channels_last),
            )
    if len(images) == 16 or not HAS_DIFFUSERS:
        makers["ours, reference"] = lambda: functools.partial(
            copy.deepcopy(vae).to(dtype).encode, images
        )
    makers["ours"] = lambda: functools.partial(fastest_encode(vae, dtype), images)
    if len(images) <= 4:
        makers["ours, as a graph"] = lambda: as_graph(fastest_encode(vae, dtype), images)
    return makers


def measure_rates(
    vae: KLAutoencoder, precision: str, side_px: int, batches: list[int], ceilings: dict[str, float]
) -> dict[str, Any]:
    """Return images/s of all contenders at one size."""
    figures: dict[str, Any] = {}
    rows = []
    for batch in batches:
        images = torch.randint(0, 256, (batch, 3, side_px, side_px), dtype=torch.uint8).cuda()
        for name, make in gpu_contenders(vae, precision, images).items():
            key = f"{name}, {batch}"
            try:
                rate = batch / seconds_on_gpu(make())
            except RuntimeError as error:  # out of memory is one of them
                figures[key] = {"error": str(error)[:200]}
                rows.append([key, "", "", "", str(error)[:40]])
                continue
            finally:
                torch.cuda.empty_cache()
            teraflops = rate * TERAFLOP_PER_IMAGE[side_px]
            theirs = figures.get(f"diffusers, {batch}", {}).get("images_per_s")
            figures[key] = {
                "images_per_s": round(rate, 1),
                "to_diffusers": round(rate / theirs, 2) if theirs else None,
                "teraflop_per_s": round(teraflops, 1),
                "share_of_peak": round(teraflops / ceilings[precision], 3),
            }
            rows.append([key, *map(str, figures[key].values())])
    if not HAS_DIFFUSERS:
        rows.append(["diffusers", "not installed", "", "", ""])
    columns = ["images/s", "x diffusers", "TFLOP/s", "of peak"]
    print_table(f"{side_px} px, {precision}, by batch size", columns, rows)
    return figures


def measure_compiled(vae: KLAutoencoder) -> dict[str, Any]:
    """Compare the compiled encoder of diffusers with ours. Each size takes a while to compile."""
    figures: dict[str, Any] = {}
    for side_px, batch in ((512, 16), (1024, 8), (256, 64)):
        images = torch.randint(0, 256, (batch, 3, side_px, side_px), dtype=torch.uint8).cuda()
        floats = as_floats(images, torch.float16, channels_last=True)
        ours = batch / seconds_on_gpu(functools.partial(fastest_encode(vae, torch.float16), images))
        began = time.perf_counter()
        encode = diffusers_encode(vae, torch.float16, channels_last=True, compiled=True)
        theirs = batch / seconds_on_gpu(functools.partial(encode, floats))
        took_s = time.perf_counter() - began
        figures[f"{side_px} px, {batch}"] = {
            "diffusers, compiled": round(theirs, 1),
            "ours": round(ours, 1),
            "ratio": round(ours / theirs, 2),
        }
        print(
            f"{side_px} px: compiled {theirs:.1f}/s ({took_s:.0f} s to compile), ours {ours:.1f}/s"
        )
        write_results("encoder", {"gpu, compiled": figures}, PACKAGES)
    return figures


def measure_norms() -> dict[str, Any]:
    """Measure GroupNorm with SiLU at the sizes of a batch of 16 at 512 px, in GB/s."""
    from latentcache.vae import kernels

    figures: dict[str, Any] = {}
    rows = []
    for side, channels in ((512, 128), (256, 256), (128, 512), (64, 512)):
        x = torch.randn((16, side, side, channels), device="cuda", dtype=torch.float16)
        weight, shift = torch.rand((2, channels), device="cuda")
        half = weight.half(), shift.half()
        nchw = x.permute(0, 3, 1, 2)
        nbytes = 3 * x.numel() * x.element_size()
        works: Contenders = {
            "torch, NCHW": functools.partial(_torch_norm, nchw.contiguous(), *half),
            "torch, channels_last": functools.partial(_torch_norm, nchw, *half),
        }
        times = {name: seconds_on_gpu(work) for name, work in works.items()}
        chosen = kernels.TILE, kernels.NUM_WARPS
        for tile in (2048, 4096, 8192):
            for num_warps in (4, 8):
                kernels.TILE, kernels.NUM_WARPS = tile, num_warps
                name = f"ours, tile {tile}, {num_warps} warps"
                times[name] = seconds_on_gpu(
                    lambda: kernels.group_norm(x, None, None, weight, shift, 32, 1e-6, True)  # noqa: B023
                )
        kernels.TILE, kernels.NUM_WARPS = chosen
        speeds = {name: round(nbytes / seconds / 1e9) for name, seconds in times.items()}
        figures[f"{side}x{side}x{channels}"] = speeds
        rows.append([f"{side}x{side}x{channels}", *map(str, speeds.values())])
        columns = list(speeds)
    print_table("GroupNorm + SiLU, fp16, batch 16, GB/s", columns, rows)
    return figures


def _torch_norm(x: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, 32, weight, shift, 1e-6), inplace=True)


def measure_attention() -> dict[str, Any]:
    """Measure one head of 512 channels, ours and torch's choice, in milliseconds per image."""
    from latentcache.vae import kernels

    figures: dict[str, Any] = {}
    for side_px, batch in ((256, 16), (512, 4), (1024, 1)):
        q, k, v = (
            torch.randn((batch, (side_px // 8) ** 2, 3 * 512), device="cuda").half().chunk(3, 2)
        )
        scaled = q * 512**-0.5
        figures[f"{side_px} px"] = {
            name: round(seconds_on_gpu(functools.partial(attend, scaled, k, v)) / batch * 1e3, 3)
            for name, attend in (("torch", plain.attend), ("ours", kernels.attend))
        }
    rows = [[name, *map(str, times.values())] for name, times in figures.items()]
    print_table("attention, fp16, ms an image", ["torch", "ours"], rows)
    return figures


def profile(vae: KLAutoencoder) -> dict[str, Any]:
    """Measure the slowest kernels, in milliseconds per image of 512 px."""
    encode = fastest_encode(vae, torch.float16)
    images = torch.randint(0, 256, (16, 3, 512, 512), dtype=torch.uint8).cuda()
    for _ in range(3):
        encode(images)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        encode(images)
        torch.cuda.synchronize()
    spent = [event for event in profiler.key_averages() if event.device_type.name == "CUDA"]
    spent.sort(key=lambda event: -event.self_device_time_total)
    whole = sum(event.self_device_time_total for event in spent)
    figures = {
        event.key[:120]: {
            "calls": event.count,
            "ms_per_image": round(event.self_device_time_total / 1e3 / len(images), 4),
            "share": round(event.self_device_time_total / whole, 3),
        }
        for event in spent[:24]
    }
    rows = [[name[:76], *(f"{v:g}" for v in values.values())] for name, values in figures.items()]
    print_table("ours at 512 px, fp16, batch 16", ["calls", "ms/image", "share"], rows)
    return figures


def measure_drift(vaes: dict[str, KLAutoencoder], side_px: int, num: int) -> dict[str, Any]:
    """Return the drift of each precision from fp32 in dB, on drawn images."""
    figures: dict[str, Any] = {}
    for name, vae in vaes.items():
        channels = vae.architecture.latent_channels
        images = draw_images(num, side_px, str(vae.device))
        exact = vae.encode(images)[:, :channels]
        figures[name] = {
            precision: round(drift_db(fastest_encode(vae, dtype)(images)[:, :channels], exact), 1)
            for precision, dtype in PRECISION_DTYPES.items()
        }
    rows = [[name, *(f"{db:.1f}" for db in drifts.values())] for name, drifts in figures.items()]
    print_table(f"drift from fp32 at {side_px} px, dB", list(PRECISION_DTYPES), rows)
    return figures


def bench_gpu() -> None:
    torch.backends.cudnn.benchmark = True  # for all contenders
    require_fp32()
    vae = make_kl_f8("cuda")
    demo = latentcache.load_vae("demo", device="cuda", decoder=False)

    def keep(part: str, figures: dict[str, Any]) -> None:
        write_results("encoder", {f"gpu, {part}": figures}, PACKAGES)

    ceilings = measure_ceilings()
    keep("ceilings", ceilings)
    keep("drift", measure_drift({"demo": demo, "kl-f8, random": vae}, 512, 4))
    keep("512 px, fp16", measure_rates(vae, "fp16", 512, [1, 16, 64], ceilings))
    keep("profile", profile(vae))
    keep("256 px, fp16", measure_rates(vae, "fp16", 256, [1, 16, 64], ceilings))
    keep("1024 px, fp16", measure_rates(vae, "fp16", 1024, [1, 8], ceilings))
    if HAS_DIFFUSERS:
        measure_compiled(vae)
    keep("norms", measure_norms())
    keep("attention", measure_attention())
    for side_px, batch in ((512, 16), (256, 64), (1024, 8)):
        figures = measure_rates(vae, "bf16", side_px, [batch], ceilings)
        keep(f"{side_px} px, bf16", figures)


# On a CPU.


def cpu_contenders(vae: KLAutoencoder, images: Tensor) -> Contenders:
    figures: Contenders = {}
    if HAS_DIFFUSERS:
        for name, channels_last in (("diffusers", False), ("diffusers, channels_last", True)):
            encode = diffusers_encode(vae, torch.float32, channels_last=channels_last)
            floats = as_floats(images, torch.float32, channels_last=channels_last)
            figures[name] = functools.partial(encode, floats)
    figures["ours, reference"] = functools.partial(vae.encode, images)
    for name, dtype in (("ours", torch.float32), ("ours, bf16", torch.bfloat16)):
        figures[name] = functools.partial(FastEncoder(vae, dtype, plain), images)
    return figures


def measure_threads(
    vae: KLAutoencoder, title: str, num_threads: int, batches: list[int], rounds: int
) -> dict[str, Any]:
    """Return images/s of all contenders by batch size, with this many torch threads."""
    torch.set_num_threads(num_threads)
    figures: dict[str, Any] = {}
    for batch in batches:
        contenders = cpu_contenders(vae, draw_images(batch, 256, "cpu"))
        for name, seconds in take_turns(contenders, rounds).items():
            figures.setdefault(name, {})[str(batch)] = round(batch / seconds, 2)
    rows = [[name, *(f"{rate:.2f}" for rate in rates.values())] for name, rates in figures.items()]
    print_table(f"{title}, {num_threads} threads: images/s by batch size", figures["ours"], rows)
    return figures


def measure_side_by_side(vae: KLAutoencoder) -> dict[str, float]:
    """Measure threads of ours with one image and one torch thread each, as in an actor."""
    torch.set_num_threads(1)
    encode = FastEncoder(vae, torch.float32, plain)
    images = list(draw_images(24, 256, "cpu")[:, None])
    figures = {}
    for num_threads in (1, 2):
        with ThreadPoolExecutor(
            num_threads, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            work = functools.partial(_drain, pool, encode, images)
            seconds = take_turns({"": work}, 5)[""]
        figures[f"{num_threads} threads"] = round(len(images) / seconds, 1)
    print(f"one image a thread: {', '.join(f'{k} {v}/s' for k, v in figures.items())}")
    return figures


def _drain(
    pool: ThreadPoolExecutor, encode: Callable[[Tensor], Tensor], images: list[Tensor]
) -> None:
    list(pool.map(encode, images))


def bench_cpu() -> None:
    demo, large = latentcache.load_vae("demo", decoder=False), make_kl_f8("cpu")
    parts: dict[str, Any] = {}
    for num_threads in (1, 2):
        batches = [1, 2, 4, 8]
        figures = measure_threads(demo, "demo VAE, 256 px", num_threads, batches, rounds=5)
        parts[f"cpu, demo, {num_threads} threads"] = figures
    parts["cpu, demo, one image a thread"] = measure_side_by_side(demo)
    figures = measure_threads(large, "published size, 256 px", 2, [1], rounds=3)
    parts["cpu, kl-f8, 2 threads"] = figures
    parts["cpu, drift"] = measure_drift({"demo": demo, "kl-f8, random": large}, 256, 4)
    write_results("encoder", parts, PACKAGES)


def main() -> None:
    with torch.inference_mode():
        bench_gpu() if torch.cuda.is_available() else bench_cpu()


if __name__ == "__main__":
    main()
