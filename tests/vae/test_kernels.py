"""The Triton kernels and the fast encoder against float64: on a GPU, else under the interpreter.

Needs nothing of the other tests, so that a machine with a GPU and little else can run it:
`pytest --noconftest tests/vae/test_kernels.py`.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from latentcache.metrics import drift_db
from latentcache.vae import plain
from latentcache.vae.architecture import Architecture
from latentcache.vae.fast import FastEncoder
from latentcache.vae.model import KLAutoencoder

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    assert os.environ["TRITON_INTERPRET"] == "1", "conftest.py sees to that"

kernels = pytest.importorskip("latentcache.vae.kernels")

MODULES = [plain, kernels] if DEVICE == "cpu" else [kernels]

# Half a unit in the last place of values around four, twice over.
TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = list(TOLERANCES)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def exact_norm(
    x: Tensor, bias: Tensor | None, weight: Tensor, shift: Tensor, num_groups: int, silu: bool
) -> Tensor:
    x = x.double() + (0 if bias is None else bias.double())
    out = F.group_norm(x.permute(0, 3, 1, 2), num_groups, weight.double(), shift.double(), 1e-6)
    return (F.silu(out) if silu else out).permute(0, 2, 3, 1)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


# Batch, height, width, channels, groups: one pixel; what fills no tile; groups of no power of two;
# the published widths, in many chunks of which the last is short.
SHAPES = [
    (1, 1, 1, 32, 8),
    (3, 5, 7, 16, 8),
    (2, 9, 31, 48, 8),
    (1, 20, 13, 60, 3),
    (2, 13, 9, 128, 32),
    (1, 5, 13, 256, 32),
    (1, 3, 6, 512, 32),
]
# Each shape in float32, and the widest in all.
CASES = [(shape, torch.float32) for shape in SHAPES[:-1]] + [(SHAPES[-1], d) for d in DTYPES]


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_group_norm(shape: tuple[int, ...], dtype: torch.dtype):
    *size, channels, num_groups = shape
    x, bias = noise(*size, channels, dtype=dtype) * 3 + 1, noise(channels, seed=1)
    weight, shift = noise(channels, seed=2), noise(channels, seed=3)
    for given, silu in ((None, False), (bias, True)):
        actual = kernels.group_norm(x, given, None, weight, shift, num_groups, 1e-6, silu)
        assert actual.dtype == dtype
        expected = exact_norm(x, given, weight, shift, num_groups, silu)
        assert_near(actual, expected, TOLERANCES[dtype])


@pytest.mark.parametrize("far", [1e3, 1e5])
def test_group_norm_far_from_zero(far: float):
    """Where a mean of squares less a squared mean has no digit left."""
    x = noise(2, 20, 20, 64) + far
    weight, shift = torch.ones(64, device=DEVICE), torch.zeros(64, device=DEVICE)
    actual = kernels.group_norm(x, None, None, weight, shift, 8, 1e-6, False)
    expected = exact_norm(x, None, weight, shift, 8, False)
    assert_near(actual, expected, far * 2**-23)
    x = noise(1, 20, 20, 64) + torch.linspace(-far, far, 64, device=DEVICE)  # channels far apart
    actual = kernels.group_norm(x, None, None, weight, shift, 8, 1e-6, False)
    assert_near(actual, exact_norm(x, None, weight, shift, 8, False), 1e-4)


def test_group_norm_of_a_constant_is_its_shift():
    x = torch.full((1, 16, 16, 32), 3.0, device=DEVICE)
    weight, shift = torch.ones(32, device=DEVICE), noise(32)
    actual = kernels.group_norm(x, None, None, weight, shift, 32, 1e-6, False)
    assert torch.equal(actual, shift.expand_as(actual))


def test_group_norm_is_deterministic_and_independent_of_other_images():
    x = noise(3, 20, 10, 128, dtype=torch.float16)
    weight, shift = noise(128, seed=1), noise(128, seed=2)
    first, again = (
        kernels.group_norm(x, None, None, weight, shift, 32, 1e-6, True) for _ in range(2)
    )
    assert torch.equal(first, again)
    x[1] = torch.nan
    spoilt = kernels.group_norm(x, None, None, weight, shift, 32, 1e-6, True)
    assert torch.equal(spoilt[[0, 2]], first[[0, 2]])
    assert spoilt[1].isnan().all()


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_add_returns_the_statistics_of_the_sum(shape: tuple[int, ...], dtype: torch.dtype):
    *size, channels, num_groups = shape
    x, h = noise(*size, channels, dtype=dtype), noise(*size, channels, seed=1, dtype=dtype) + 2
    bias = noise(channels, seed=2)
    weight, shift = noise(channels, seed=3), noise(channels, seed=4)
    for given in (None, bias):
        out, statistics = kernels.add(x, h, given, num_groups)
        expected = x.double() + h.double() + (0 if given is None else given.double())
        assert_near(out, expected, TOLERANCES[dtype])
        actual = kernels.group_norm(out, None, statistics, weight, shift, num_groups, 1e-6, True)
        expected = exact_norm(out, None, weight, shift, num_groups, True)
        assert_near(actual, expected, TOLERANCES[dtype])


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 16), (2, 7, 5, 48), (3, 16, 24, 128)])
def test_add_padded_appends_a_row_and_a_column_of_zeros(module: ModuleType, shape: tuple[int, ...]):
    x, h, bias = noise(*shape), noise(*shape, seed=1), noise(shape[3], seed=2)
    for other in (None, h):
        for given in (None, bias):
            actual = module.add_padded(x.clone(), other, given)
            expected = x + (0 if other is None else other) + (0 if given is None else given)
            assert_near(actual, F.pad(expected, (0, 0, 0, 1, 0, 1)), 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("most", [2**27, 1200, 100])  # all images, one image, some queries at once
def test_attention(dtype: torch.dtype, most: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "MAX_SCORES", most)
    if most == 100:
        monkeypatch.setattr(kernels, "_MAX_SOFTMAX_TILE", 8)  # and rows longer than a tile
    q, k, v = noise(3, 33, 3 * 64, dtype=dtype).chunk(3, dim=2)  # strided, as in the encoder
    scores = q.double() @ k.double().mT
    assert scores.max() > 20, "sharp enough to overflow an exponential that is not shifted"
    expected = scores.softmax(dim=2) @ v.double()
    for module in MODULES:
        assert_near(module.attend(q, k, v), expected, TOLERANCES[dtype])


@pytest.mark.parametrize("module", MODULES)
def test_to_input_converts_pixels_to_normalised_maps(module: ModuleType):
    images = torch.arange(256, dtype=torch.uint8, device=DEVICE).repeat(6).view(2, 3, 8, 32)
    actual = module.to_input(images, torch.float32)
    expected = (images.double() / 127.5 - 1).permute(0, 2, 3, 1)
    assert_near(actual[..., :3], expected, 1e-6)
    assert not actual[..., 3:].any()
    assert actual.shape == (2, 8, 32, module.NUM_INPUT_CHANNELS)
    assert actual.is_contiguous()


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "kl-f8": {"block_out_channels": (32, 64, 64, 64), "layers_per_block": 2},
    "demo": {
        "block_out_channels": (16, 32, 48, 64),
        "norm_num_groups": 8,
        "latent_channels": 16,
        "mid_block_add_attention": False,
    },
    "no quant_conv": {"block_out_channels": (32, 32), "use_quant_conv": False},
    "one block": {"block_out_channels": (32,), "norm_num_groups": 4},
}


def make_vae(name: str) -> KLAutoencoder:
    """Random weights, but such that no bias, norm or attention could go missing unseen."""
    torch.manual_seed(0)
    vae = KLAutoencoder(Architecture(**ARCHITECTURES[name]), decoder=False)
    for key, parameter in vae.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean="norm" in key and "weight" in key, std=0.3)
        if "to_q" in key or "to_k" in key:
            parameter.data *= 3
    return vae.eval().requires_grad_(False).to(DEVICE)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def vae(request: pytest.FixtureRequest) -> KLAutoencoder:
    return make_vae(request.param)


@pytest.fixture(scope="module")
def images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (2, 3, 16, 8), generator=generator, dtype=torch.uint8).to(DEVICE)


@pytest.fixture(autouse=True)
def _fp32_is_fp32() -> None:
    torch.backends.cudnn.conv.fp32_precision = "ieee"


@pytest.mark.parametrize("module", MODULES)
def test_the_fast_encoder_matches_the_reference(
    vae: KLAutoencoder, images: Tensor, module: ModuleType
):
    expected = vae.encode(images)
    actual = FastEncoder(vae, torch.float32, module)(images)
    assert actual.dtype == torch.float32
    assert actual.is_contiguous()
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_fast_encoder_in_16_bits_has_no_more_drift_than_the_reference(
    vae: KLAutoencoder, images: Tensor, module: ModuleType, dtype: torch.dtype
):
    expected = vae.encode(images)
    actual_db = drift_db(FastEncoder(vae, dtype, module)(images), expected)
    expected_db = drift_db(copy.deepcopy(vae).to(dtype).encode(images), expected)
    assert actual_db > expected_db - 3
    assert actual_db < 90, "it was not computed in 16 bits"


def test_the_fast_encoder_does_not_change_the_vae(images: Tensor):
    vae = make_vae("kl-f8")
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    for module in MODULES:
        FastEncoder(vae, torch.float32, module)(images)
    assert all(torch.equal(tensor, before[name]) for name, tensor in vae.state_dict().items())


@pytest.mark.slow
def test_kernels_compile_for_gpus_with_wide_accesses_and_without_spills():
    """With wide accesses and nothing spilt; the compiler needs no GPU."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).parents[1] / "support" / "compile_kernels.py"
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("16-byte") == 24
