"""Compile the Triton kernels for Hopper GPUs, on a machine without one, and look at what came out.

    python -m benchmarks.triton_compile [--quick]

Every tile that would be timed on a GPU (ffn/kernels/triton_tuning.py) at the shapes of the speed goals, in bf16: the
matmuls must use the tensor cores' asynchronous instructions (wgmma), spill no register, and fit shared memory. Needs
the package triton, on Linux, whose PTX assembler reports the registers.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from ssd_megatron.ffn.kernels import triton_kernels as kernels
from ssd_megatron.ffn.kernels.triton_routing import MAX_ROWS_PER_TILE
from ssd_megatron.ffn.kernels.triton_tuning import SHARED_MEMORY

HOPPER = GPUTarget("cuda", 90, 32)
ROWS_PER_EXPERT = 4096  # 16,384 tokens at a quarter of the experts
# Kernel and the pointers that are None: in up and down_grad of plain ReLU, of GELU, of a gated activation with biases.
RELU = {"b", "w_up", "b_up", "pre", "pre_up", "d_up", "a_up"}
GATED: set[str] = set()
INTEGERS = {"token", "first_row", "tile_expert", "tile_row"}
SHAPES = ((2048, 512), (2048, 256), (2048, 128), (4096, 512))
"""Hidden size and neurons of an expert."""


@dataclass(frozen=True)
class Compiled:
    """What became of one kernel with one tile."""

    name: str
    registers: int
    spilled: int
    shared: int
    wgmma: int
    async_copies: int

    @property
    def ok(self) -> bool:
        return self.spilled == 0 and self.shared <= SHARED_MEMORY and self.wgmma > 0

    def __str__(self) -> str:
        return (
            f"{self.registers:4d} registers {self.spilled:5d} bytes spilled {self.shared / 1024:5.0f} KiB shared "
            f"{self.wgmma:3d} wgmma {self.async_copies:3d} cp.async {'ok    ' if self.ok else 'FAILED'} {self.name}"
        )


def compiled(name: str, kernel: Any, absent: set[str], constants: dict[str, Any], config: Any) -> Compiled:
    """Compile one kernel with one tile, as a call with bf16 tensors would."""
    function = kernel.fn
    constants = {**constants, **config.kwargs, **dict.fromkeys(absent)}
    signature, aligned = {}, {}
    for place, argument in enumerate(function.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in ("load", "copies"):
            signature[argument] = "i32"
        else:
            signature[argument] = "*i32" if argument in INTEGERS else "*fp32" if argument == "dgate" else "*bf16"
            aligned[(place,)] = [["tt.divisibility", 16]]
    fixed = {(function.arg_names.index(n),): value for n, value in constants.items() if n in function.arg_names}
    source = ASTSource(fn=function, signature=signature, constexprs=fixed, attrs=aligned)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    binary = triton.compile(source, target=HOPPER, options=options)
    ptx = binary.asm["ptx"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(90).path, "-v", "-arch=sm_90a", file.name, "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    tile = " ".join(f"{side} {size}" for side, size in config.kwargs.items())
    return Compiled(
        name=f"{name}: {tile}, {config.num_warps} warps, {config.num_stages} stages",
        registers=int(re.findall(r"Used (\d+) registers", report)[0]),
        spilled=sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", report)),
        shared=binary.metadata.shared,
        wgmma=ptx.count("wgmma.mma_async"),
        async_copies=ptx.count("cp.async.cg"),
    )


def variants(hidden: int, size: int) -> Iterator[tuple[str, Any, set[str], dict[str, Any]]]:
    """Name, kernel, absent pointers and constants of every kernel at one shape."""
    sizes = {"H": hidden, "N": size, "PRECISION": "ieee"}
    tiled = {**sizes, "BM": MAX_ROWS_PER_TILE}
    yield "up, relu", kernels.up, RELU, {**tiled, "ACT": "relu"}
    yield "up, gelu", kernels.up, RELU - {"pre", "b"}, {**tiled, "ACT": "gelu"}
    yield "up, swiglu", kernels.up, GATED, {**tiled, "ACT": "silu"}
    yield "down_grad, relu", kernels.down_grad, RELU, {**tiled, "ACT": "relu"}
    yield "down_grad, gelu", kernels.down_grad, RELU - {"pre"}, {**tiled, "ACT": "gelu"}
    yield "down_grad, swiglu", kernels.down_grad, GATED, {**tiled, "ACT": "silu"}
    yield "down", kernels.down, RELU, tiled
    yield "down, gated", kernels.down, GATED, tiled
    yield "weight_grad", kernels.weight_grad, set(), sizes


def all_compiled(shapes: tuple[tuple[int, int], ...]) -> Iterator[Compiled]:
    element = torch.empty(1, dtype=torch.bfloat16)  # tells the tuner the size of elements
    for hidden, size in shapes:
        for name, kernel, absent, constants in variants(hidden, size):
            w_up = None if "w_up" in absent or "w_up" not in kernel.arg_names else element
            given = {**constants, "load": ROWS_PER_EXPERT, "x": element, "w_up": w_up}
            for config in kernel.early_config_prune(kernel.configs, {}, **given):
                yield compiled(f"h {hidden}, n {size}, {name}", kernel, absent, constants, config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape instead of four")
    args = parser.parse_args()
    failed = 0
    for result in all_compiled(SHAPES[1:2] if args.quick else SHAPES):
        print(result, flush=True)
        failed += not result.ok
    sys.exit(f"{failed} kernels failed" if failed else 0)


if __name__ == "__main__":
    main()
