"""Speed of the sparse feed-forward network beside the dense one: forward and backward, routing included. On a machine
with a GPU this is `benchmarks.ffn_gpu`; else, on CPU:

    python -m benchmarks.ffn [--quick] [--json FILE] [--threads N]

Every row is a ratio of times from one process, better when lower; 0.25 is what the FLOPs alone would give. The variants
take turns, a sparse one always after a dense one: caches are then cold, as among the other layers of a model. Each turn
has inputs and so a routing of its own, as bf16 matmuls compile code for every new shape. A row is the median of the
turns' ratios. Freed memory is kept, as in a job; the sparse network has the backend that `auto` takes here, and in one
row backend torch.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import ffn_gpu
from benchmarks.row import Row
from benchmarks.table import parser_for, report
from benchmarks.timing import paired
from ssd_megatron.ffn.kernels import choose_backend, sparse_ffn
from ssd_megatron.ffn.kernels.cpp_products import sort_copies
from ssd_megatron.ffn.kernels.dispatch import dispatch
from ssd_megatron.ffn.routers import router_weights_from_bank
from ssd_megatron.ffn.switchable import FFNSettings, SwitchableFFN
from ssd_megatron.parallel.device import IS_CUDA, keep_freed_memory

TOKENS = 2048
TURNS = 15
WARM_UP = 10  # turns that are not counted: by then most shapes of bf16 matmuls have been compiled
IDEAL = 0.25  # a quarter of the experts for each token
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Case:
    """One network, and the ratio it must reach. `skew`: size of the component that all tokens have in common."""

    dtype: torch.dtype
    hidden: int
    neurons: int
    experts: int
    goal: float
    skew: float = 0.0
    activation: str = "relu"

    def __str__(self) -> str:
        name = f"{NAMES[self.dtype]} h {self.hidden}, d_ff {self.neurons}, {self.experts} experts of {self.size}"
        return name + f", {self.activation}" * (self.activation != "relu") + ", skewed load" * (self.skew > 0)

    @property
    def size(self) -> int:
        return self.neurons // self.experts


QUICK_CASES = (
    Case(torch.float32, 512, 2048, 16, goal=0.36),
    Case(torch.float32, 512, 2048, 32, goal=0.42),
    Case(torch.bfloat16, 512, 2048, 16, goal=0.36),
    Case(torch.bfloat16, 512, 2048, 32, goal=0.50),
)
CASES = (
    *QUICK_CASES,
    Case(torch.float32, 1024, 4096, 16, goal=0.31),
    Case(torch.bfloat16, 1024, 4096, 16, goal=0.31),
    # An uneven load costs padding or small matmuls: sparse must at least not be slower than dense.
    Case(torch.float32, 512, 2048, 16, goal=1.0, skew=0.5),
    Case(torch.float32, 512, 2048, 32, goal=1.0, skew=0.5),
    Case(torch.bfloat16, 512, 2048, 16, goal=1.0, skew=0.5),
    Case(torch.bfloat16, 512, 2048, 32, goal=1.0, skew=0.5),
    Case(torch.float32, 512, 2048, 16, goal=0.36, activation="reglu"),
    Case(torch.bfloat16, 512, 2048, 16, goal=0.36, activation="reglu"),
)


# Tokens that share their experts; without a gather per token small experts should cost nothing.
TILES = (64, 128, 256)
TILED_CASES = (
    Case(torch.float32, 512, 2048, 32, goal=0.40),
    Case(torch.float32, 512, 2048, 64, goal=0.40),
    Case(torch.bfloat16, 512, 2048, 32, goal=0.55),
    Case(torch.bfloat16, 512, 2048, 64, goal=0.55),
)


def build(case: Case, tile: int = 1, *, backend: str = "auto") -> SwitchableFFN:
    torch.manual_seed(0)
    backend, _ = choose_backend(backend, torch.device("cpu"), case.dtype)
    settings = FFNSettings(
        hidden_size=case.hidden,
        ffn_hidden_size=case.neurons,
        activation=case.activation,
        add_bias=False,
        num_experts=case.experts,
        top_k=case.experts // 4,
        router_update="straight_through",
        backend=backend,
        routing_granularity=tile,
    )
    ffn = SwitchableFFN(SimpleNamespace(params_dtype=case.dtype), settings)
    with torch.no_grad():
        for w_FH in ffn.bank.neuron_parameters().values():
            w_FH.normal_(std=case.hidden**-0.5)
        ffn.router.weight.copy_(router_weights_from_bank(ffn.bank.rows(), case.experts))
    return ffn


def inputs(case: Case) -> Tensor:
    common_H = case.skew * torch.randn(case.hidden, generator=torch.Generator().manual_seed(0))
    x_T1H = torch.randn(TOKENS, 1, case.hidden) + common_H
    return x_T1H.to(case.dtype).requires_grad_()


def plain_dense(ffn: SwitchableFFN, x: Tensor) -> Tensor:
    """The usual two linear layers under autograd, on the same weights."""
    bank = ffn.bank
    fired = F.relu(F.linear(x, bank.rows()))
    return F.linear(fired if bank.w_gate is None else fired * F.linear(x, bank.w_in), bank.w_out.t())


def plain_sparse(ffn: SwitchableFFN, x: Tensor) -> Tensor:
    """What one would write first: tokens sorted by expert, a matmul on a slice of the weights for each."""
    bank, x_TH = ffn.bank, x.flatten(0, 1)
    expert_ids_TK, *_ = ffn.router.route(x_TH)
    token_C = expert_ids_TK.flatten().argsort(stable=True) // ffn.settings.top_k
    counts = expert_ids_TK.flatten().bincount(minlength=ffn.settings.num_experts).tolist()
    size = len(bank.w_in) // ffn.settings.num_experts
    outputs = [
        F.relu(F.linear(rows, bank.w_in[e * size : (e + 1) * size])) @ bank.w_out[e * size : (e + 1) * size]
        for e, rows in enumerate(x_TH[token_C].split(counts))
    ]
    return torch.zeros_like(x_TH).index_add(0, token_C, torch.cat(outputs)).view_as(x)


def in_mode(mode: str) -> Callable[[SwitchableFFN, Tensor], Tensor]:
    def run(ffn: SwitchableFFN, x: Tensor) -> Tensor:
        ffn.mode = mode
        return ffn(x)[0]

    return run


def kernels_alone(ffn: SwitchableFFN, x: Tensor) -> Callable[[SwitchableFFN, Tensor], Tensor]:
    """The sparse network with the experts of these inputs chosen beforehand."""
    routing = ffn.router.route(x.detach().flatten(0, 1))
    gates_TK = torch.ones(routing.expert_ids_TK.shape, requires_grad=True)

    def run(ffn: SwitchableFFN, x: Tensor) -> Tensor:
        bank, s = ffn.bank, ffn.settings
        args = (routing.expert_ids_TK, gates_TK, bank.tensors(), bank.activation, s.num_experts, s.backend)
        return sparse_ffn(x.flatten(0, 1), *args).view_as(x)

    return run


def seconds(run: Callable[[SwitchableFFN, Tensor], Tensor], ffn: SwitchableFFN, x: Tensor, dy: Tensor) -> float:
    """One forward and backward to all that the variant reads."""
    ffn.zero_grad(set_to_none=True)
    x.grad = None
    started = time.perf_counter()
    run(ffn, x).backward(dy)
    return time.perf_counter() - started


def ratios(case: Case, turns: int) -> Iterator[Row]:
    ffn, plain_backend = build(case), build(case, backend="torch")
    dy = torch.randn(TOKENS, 1, case.hidden).to(case.dtype)
    times: dict[str, list[float]] = {
        name: [] for name in ("plain", "kernels", "dense", "sparse", "dense again", "torch")
    }
    loads = []
    for turn in range(-WARM_UP, turns):
        x = inputs(case)
        dense, sparse = in_mode("dense"), in_mode("sparse")
        variants = (plain_dense, kernels_alone(ffn, x), dense, sparse, dense, sparse)
        for name, run in zip(times, variants, strict=True):
            taken = seconds(run, plain_backend if name == "torch" else ffn, x, dy)
            if turn >= 0:
                times[name].append(taken)
        loads.append(ffn.expert_load.max().item() / ffn.expert_load.float().mean().item())
    best = min(("plain", "dense"), key=lambda name: statistics.median(times[name]))
    name = f"{case} (dense {statistics.median(times[best]) * 1e3:.0f} ms, load max/mean {statistics.median(loads):.1f})"
    yield Row(f"{name}: sparse / dense", paired(times["sparse"], times[best]), case.goal, IDEAL)
    if ffn.settings.backend != "torch":
        yield Row(f"{case}: sparse / dense, backend torch", paired(times["torch"], times[best]), 1.0, IDEAL)
    yield Row(f"{case}: its kernels alone / dense", paired(times["kernels"], times[best]), case.goal, IDEAL)
    if case.skew == 0:
        yield Row(f"{case}: dense mode / plain layers", paired(times["dense"], times["plain"]), 1.05, 1.0)


def by_tiles(case: Case, turns: int) -> Iterator[Row]:
    """Tokens that share their experts beside tokens that choose for themselves."""
    networks = {tile: build(case, tile, backend="torch") for tile in (1, *TILES)}
    dy = torch.randn(TOKENS, 1, case.hidden).to(case.dtype)
    times: dict[int, list[float]] = {0: [], **{tile: [] for tile in networks}}
    for turn in range(-WARM_UP, turns):
        x = inputs(case)
        taken = {0: seconds(in_mode("dense"), networks[1], x, dy)}
        taken |= {tile: seconds(in_mode("sparse"), ffn, x, dy) for tile, ffn in networks.items()}
        if turn >= 0:
            for tile, spent in taken.items():
                times[tile].append(spent)
    alone = {"tokens alone / dense": paired(times[1], times[0])}
    for tile in TILES:
        name = f"{case}: {tile} tokens share their experts / dense"
        yield Row(name, paired(times[tile], times[0]), case.goal, IDEAL, details=alone)


def overhead(case: Case, turns: int) -> Row:
    """Scores, choice of experts and slots, of the whole sparse network."""
    ffn = build(case)
    dy = torch.randn(TOKENS, 1, case.hidden).to(case.dtype)
    routing, whole = [], []
    for _ in range(turns):
        x = inputs(case)
        started = time.perf_counter()
        expert_ids_TK, *_ = ffn.router.route(x.flatten(0, 1))
        if ffn.settings.backend == "cpp":
            sort_copies(expert_ids_TK, case.experts)
        else:
            dispatch(expert_ids_TK, case.experts, case.hidden * x.element_size())
        routing.append(time.perf_counter() - started)
        whole.append(seconds(in_mode("sparse"), ffn, x, dy))
    return Row(f"{case}: routing and dispatch, share of sparse", paired(routing, whole), 0.12, 0.0)


def against_plain_sparse(case: Case, turns: int) -> Row:
    ffn = build(case)
    dy = torch.randn(TOKENS, 1, case.hidden).to(case.dtype)
    ours, plain = [], []
    for _ in range(turns):
        x = inputs(case)
        ours.append(seconds(in_mode("sparse"), ffn, x, dy))
        plain.append(seconds(plain_sparse, ffn, x, dy))
    return Row(f"{case}: ours / sorted loop under autograd", paired(ours, plain), 0.33, 0.0)


def rows(quick: bool) -> Iterator[Row]:
    turns = 9 if quick else TURNS
    for case in QUICK_CASES if quick else CASES:
        yield from ratios(case, turns)
    yield overhead(QUICK_CASES[1], turns)
    yield overhead(QUICK_CASES[3], turns)
    for case in TILED_CASES[1::2] if quick else TILED_CASES:
        yield from by_tiles(case, turns)
    if not quick:
        yield against_plain_sparse(QUICK_CASES[1], 9)


def main() -> int:
    parser = parser_for(__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    measured = ffn_gpu.rows(args.quick) if IS_CUDA else rows(args.quick)
    return 0 if report("sparse feed-forward network", measured, args.json) else 1


if __name__ == "__main__":
    sys.exit(main())
