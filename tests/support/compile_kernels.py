"""Compile the Triton kernels for GPUs that are not here, and look at what came out.

Prints a line for each kernel, width and architecture; fails where a published width is not read and
written 16 bytes at a time, or where more than a register or two spill.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from latentcache.vae import kernels, triton_kernels

CAPABILITIES = (80, 90)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
FLOATS = ("bias", "statistics", "weight", "shift", "sums", "scores")
MULTIPLES_OF_16 = ("num_pixels", "chunk_pixels", "length")


def compile_kernel(
    kernel: Any, constants: dict[str, Any], capability: int, num_warps: int
) -> tuple[str, int]:
    """Compile with 16-bit maps, as a launch would; gives PTX and bytes of stack."""
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name == "eps":
            signature[name] = "fp32"
        elif name in ("x", "h", "out", "images", *FLOATS):
            signature[name] = {"images": "*u8"}.get(name, "*fp32" if name in FLOATS else "*fp16")
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
            if name in MULTIPLES_OF_16:
                attributes[(index,)] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    compiled = triton.compile(
        ASTSource(kernel, signature, values, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    (stack,) = re.findall(r"STACK:(\d+)", usage.stdout)
    return compiled.asm["ptx"], int(stack)


def main() -> int:
    cases: list[tuple[str, Any, dict[str, Any], int]] = []
    for channels in (128, 512):
        block = kernels.TILE // channels
        lanes = {"C": channels, "G": 32, "GP": 32, "DP": channels // 32, "BLOCK": block}
        flags = {"HAS_BIAS": True, "HAS_H": True}
        for writes in (True, False):
            name = f"sum of {channels}" if writes else f"statistics of {channels}"
            constants = lanes | flags | {"HAS_H": writes, "WRITES": writes}
            cases.append((name, triton_kernels.sum_kernel, constants, kernels.NUM_WARPS))
        constants = lanes | {"CHUNKS": 256, "HAS_BIAS": True, "SILU": True}
        cases.append((f"norm of {channels}", triton_kernels.normalise_kernel, constants, 8))
        constants = flags | {"C": channels, "LANES": channels, "BLOCK": block}
        cases.append(
            (f"pad of {channels}", triton_kernels.pad_kernel, constants, kernels.NUM_WARPS)
        )
    for length, num_warps in ((1024, 4), (4096, 4), (16384, 16)):
        constants = {"BLOCK": length}
        cases.append((f"row of {length}", triton_kernels.exponentials_kernel, constants, num_warps))
    cases.append(("input", triton_kernels.to_input_kernel, {"OUT": 8, "BLOCK": 1024}, 4))
    faults = 0
    for name, kernel, constants, num_warps in cases:
        for capability in CAPABILITIES:
            ptx, stack = compile_kernel(kernel, constants, capability, num_warps)
            is_wide = "ld.global.v4" in ptx and ("st.global.v4" in ptx or "statistics" in name)
            print(f"sm_{capability} {name}: {'16-byte' if is_wide else 'narrow'}, stack {stack}")
            faults += stack > 16 or not is_wide
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
