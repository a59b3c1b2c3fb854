"""Compile the Triton kernels for Hopper GPUs, on a machine without one, and look at what came out.

    python -m benchmarks.triton_compile [--quick]

Every tile that would be timed on a GPU (ffn/kernels/triton_tuning.py) at the shapes of the speed goals, in bf16: the
matmuls must use the tensor cores' asynchronous instructions (wgmma), store 16 bytes at a time, spill no register, and
fit shared memory. Needs the package triton, on Linux, whose PTX assembler reports the registers.
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
from triton.runtime.autotuner import Autotuner

from ssd_megatron.ffn.kernels import triton_decode as decode
from ssd_megatron.ffn.kernels import triton_kernels as kernels
from ssd_megatron.ffn.kernels import triton_routing as routing
from ssd_megatron.ffn.kernels.triton_routing import MAX_ROWS_PER_TILE
from ssd_megatron.ffn.kernels.triton_tuning import SHARED_MEMORY

HOPPER = GPUTarget("cuda", 90, 32)
ROWS_PER_EXPERT = 4096  # 16,384 tokens at a quarter of the experts
SHAPES = ((2048, 512), (2048, 256), (2048, 128), (4096, 512))  # hidden size, neurons of an expert
# Pointers that are None: in calls of a plain ReLU network without biases; of a gated one with biases, nothing.
PLAIN = frozenset({"b", "w_up", "b_up", "pre", "pre_up", "d_up", "a_up"})
POINTS_AT = {"dgate": "fp32", "ids": "i64", "scores": "fp32"}
INTEGERS = {"token", "first_row", "tile_expert", "tile_row", "row_of_copy", "count", "total"}
COUNTS = {"load", "copies", "parts", "tiles", "E"}  # arguments by value


@dataclass(frozen=True)
class Variant:
    """A kernel as it is called: which pointers are None, and the constants."""

    name: str
    kernel: Any
    absent: frozenset[str]
    constants: dict[str, Any]
    dtype: str = "bf16"


@dataclass(frozen=True)
class Compiled:
    """What became of a kernel with one tile."""

    name: str
    registers: int
    spilled: int
    shared: int
    wgmma: int
    async_copies: int
    narrow_stores: int  # of a single element, where 16 bytes could go at once
    is_goal: bool

    @property
    def ok(self) -> bool:
        fast = self.wgmma > 0 and self.narrow_stores == 0
        return self.spilled == 0 and self.shared <= SHARED_MEMORY and (fast or not self.is_goal)

    def __str__(self) -> str:
        return (
            f"{self.registers:4d} registers {self.spilled:5d} bytes spilled {self.shared / 1024:5.0f} KiB shared "
            f"{self.wgmma:3d} wgmma {self.async_copies:3d} cp.async "
            f"{self.narrow_stores:3d} narrow stores {'ok    ' if self.ok else 'FAILED'} {self.name}"
        )


def compiled(variant: Variant, config: Any) -> Compiled:
    """Compile a kernel with one tile, as a call would."""
    is_matmul = isinstance(variant.kernel, Autotuner)
    function = variant.kernel.fn if is_matmul else variant.kernel
    constants = {**variant.constants, **config.kwargs, **dict.fromkeys(variant.absent)}
    signature, aligned = {}, {}
    for place, argument in enumerate(function.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in COUNTS:
            signature[argument] = "i32"
        else:
            signature[argument] = "*" + ("i32" if argument in INTEGERS else POINTS_AT.get(argument, variant.dtype))
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
    tile = "".join(f" {side} {size}" for side, size in config.kwargs.items())
    return Compiled(
        name=f"{variant.name}:{tile} {config.num_warps} warps, {config.num_stages} stages",
        registers=int(re.findall(r"Used (\d+) registers", report)[0]),
        spilled=sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", report)),
        shared=binary.metadata.shared,
        wgmma=ptx.count("wgmma.mma_async"),
        async_copies=ptx.count("cp.async.cg"),
        narrow_stores=ptx.count("st.global.b16"),
        is_goal=is_matmul and variant.dtype == "bf16",
    )


def matmuls(name: str, hidden: int, size: int, dtype: str = "bf16", rows: int = MAX_ROWS_PER_TILE) -> Iterator[Variant]:
    """Every matmul kernel at one shape."""
    sizes = {"H": hidden, "N": size, "PRECISION": "ieee"}
    tiled, nothing = {**sizes, "BM": rows}, frozenset[str]()
    for kernel in (kernels.up, kernels.down_grad):
        which = f"{name}, {kernel.fn.__name__}"
        yield Variant(f"{which}, relu", kernel, PLAIN, {**tiled, "ACT": "relu"}, dtype)
        yield Variant(f"{which}, reglu", kernel, nothing, {**tiled, "ACT": "relu"}, dtype)
        yield Variant(f"{which}, swiglu", kernel, nothing, {**tiled, "ACT": "silu"}, dtype)
        yield Variant(f"{which}, gelu", kernel, PLAIN - {"b", "pre"}, {**tiled, "ACT": "gelu"}, dtype)
        yield Variant(f"{which}, geglu_tanh", kernel, nothing, {**tiled, "ACT": "gelu_tanh"}, dtype)
    yield Variant(f"{name}, down", kernels.down, PLAIN, tiled, dtype)
    yield Variant(f"{name}, down, gated", kernels.down, nothing, tiled, dtype)
    yield Variant(f"{name}, weight_grad", kernels.weight_grad, nothing, sizes, dtype)


def others() -> Iterator[Variant]:
    """The kernels that only move or count, for 32 experts."""
    bins, part, nothing = 64, {"PART": routing.COPIES_PER_PART}, frozenset[str]()
    yield Variant("count", routing._count, nothing, {"E": 32, "BINS": bins, **part})
    yield Variant("count_before", routing._count_before, nothing, {"BLOCK": 1024})
    yield Variant("list_tiles", routing._list_tiles, nothing, {"E": 32, "BINS": bins, "ROWS": MAX_ROWS_PER_TILE})
    yield Variant("place", routing._place, nothing, {"K": 8, **part})
    yield Variant("bias_grad", kernels.bias_grad, nothing, {"N": 256, "BM": 64, "BN": 64})
    yield Variant("gather_sum", kernels.gather_sum, nothing, {"H": 2048, "K": 8, "BN": 1024})


def one_token() -> Iterator[Variant]:
    """The kernels for one or two tokens, for 8 of 32 experts."""
    sizes, nothing = {"H": 4096, "N": 512, "K": 8}, frozenset[str]()
    yield Variant("one token, score", decode.score, frozenset({"b"}), {"H": 4096, **decode.SCORE_TILE})
    yield Variant("one token, best", decode.best, nothing, {"K": 8, "BINS": 32})
    yield Variant("one token, up, relu", decode.up, PLAIN, {**sizes, "ACT": "relu", **decode.UP_TILE})
    yield Variant("one token, up, swiglu", decode.up, nothing, {**sizes, "ACT": "silu", **decode.UP_TILE})
    yield Variant("one token, down", decode.down, nothing, {**sizes, **decode.DOWN_TILE})


def all_compiled(quick: bool) -> Iterator[Compiled]:
    for variant in [*others(), *one_token()]:
        yield compiled(variant, triton.Config({}))
    for hidden, size in SHAPES[1:2] if quick else SHAPES:
        for variant in matmuls(f"h {hidden}, n {size}", hidden, size):
            yield from with_each_tile(variant)
    if not quick:
        for variant in matmuls("fp32, h 520, n 72, few tokens", 520, 72, "fp32", rows=16):
            yield from with_each_tile(variant)


def with_each_tile(variant: Variant) -> Iterator[Compiled]:
    """The tiles that would be timed."""
    element = torch.empty(1, dtype=torch.bfloat16 if variant.dtype == "bf16" else torch.float32)
    pointers = {name: element for name in variant.kernel.arg_names if name not in variant.absent | {"BM", "BN", "BK"}}
    given = {**pointers, "load": ROWS_PER_EXPERT, **variant.constants}
    for config in variant.kernel.early_config_prune(variant.kernel.configs, {}, **given):
        yield compiled(variant, config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape instead of four")
    failed = 0
    for result in all_compiled(parser.parse_args().quick):
        print(result, flush=True)
        failed += not result.ok
    sys.exit(f"{failed} kernels failed" if failed else 0)


if __name__ == "__main__":
    main()
