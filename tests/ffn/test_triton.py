"""Backend triton: on a GPU if there is one, else in Triton's interpreter, where bf16 cannot be multiplied."""

import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import ssd_megatron.ffn.kernels as kernels
from ssd_megatron.errors import ConfigError
from ssd_megatron.ffn.activations import ACTIVATIONS
from ssd_megatron.ffn.bank import NeuronBank
from ssd_megatron.ffn.kernels import choose_backend, sparse_ffn, triton_ffn, triton_kernels, triton_routing
from ssd_megatron.ffn.kernels import triton_tuning as tuning
from ssd_megatron.ffn.kernels.triton_routing import sort_copies
from ssd_megatron.ffn.switchable import FFNSettings, SwitchableFFN
from tests.ffn import helpers
from tests.ffn.helpers import assert_close, choose, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else []))
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def make_bank(*args: Any) -> NeuronBank:
    return helpers.make_bank(*args).to(DEVICE)


def make_inputs(tokens: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x, dy = helpers.make_inputs(tokens, hidden, dtype)
    return x.detach().to(DEVICE).requires_grad_(), dy.to(DEVICE)


def make_gates(ids: Tensor) -> Tensor:
    return torch.ones(ids.shape, device=DEVICE, requires_grad=True)


def compare(
    bank: NeuronBank, x: Tensor, dy: Tensor, ids: Tensor, experts: int, scaled: bool = False
) -> dict[str, Tensor]:
    """Triton's results, which must be those of fp32 brute force."""
    ids, gates = ids.to(DEVICE), make_gates(ids)
    if scaled:
        gates = torch.rand_like(gates).requires_grad_()
    got = run("triton", x, dy, ids, gates, bank, experts, scaled)
    exact_x = x.detach().float().requires_grad_()
    wanted = run("reference", exact_x, dy.float(), ids, gates, bank.float(), experts, scaled)
    assert all(got[name].dtype == (torch.float32 if name == "gate" else x.dtype) for name in got)
    assert_close({name: t.float() for name, t in got.items()}, wanted, TOLERANCE[x.dtype])
    return got


@pytest.mark.parametrize("add_bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_output_and_gradients_are_those_of_reference(activation: str, add_bias: bool) -> None:
    torch.manual_seed(0)
    bank = make_bank(40, 4 * 24, activation, add_bias, torch.float32)
    x, dy = make_inputs(50, 40, torch.float32)
    ids = choose(50, 4, 2)
    ids[torch.rand(ids.shape) < 0.2] = -1  # computed elsewhere
    compare(bank, x, dy, ids, 4)


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "skew"),
    [(80, 8, 2, 0.0), (33, 12, 5, 2.0), (65, 6, 1, 1.0), (40, 8, 2, 50.0), (20, 4, 4, 0.0), (1, 16, 3, 0.0)],
)
@pytest.mark.parametrize(
    ("activation", "add_bias", "dtype"),
    [
        ("relu", False, torch.float32),
        ("squared_relu", True, torch.float16),
        ("reglu", True, torch.float32),
        *([("relu", False, torch.bfloat16)] if DEVICE == "cuda" else []),
    ],
)
def test_any_load(
    activation: str, add_bias: bool, tokens: int, experts: int, top_k: int, skew: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    bank = make_bank(64, experts * 16, activation, add_bias, dtype)
    x, dy = make_inputs(tokens, 64, dtype)
    compare(bank, x, dy, choose(tokens, experts, top_k, skew), experts)


@pytest.mark.parametrize("activation", ["relu", "gelu", "reglu", "swiglu"])
def test_scaled_gates_multiply_outputs(activation: str) -> None:
    torch.manual_seed(3)
    bank = make_bank(24, 4 * 16, activation, True, torch.float32)
    x, dy = make_inputs(40, 24, torch.float32)
    ids = choose(40, 4, 2)
    ids[torch.rand(ids.shape) < 0.2] = -1
    compare(bank, x, dy, ids, 4, scaled=True)


@pytest.mark.parametrize("size", [1, 16, 40, 72])
def test_any_expert_size(size: int) -> None:
    torch.manual_seed(2)
    bank = make_bank(24, 3 * size, "reglu", True, torch.float32)
    x, dy = make_inputs(40, 24, torch.float32)
    compare(bank, x, dy, choose(40, 3, 2), 3)


def test_experts_without_tokens_get_zero_gradients() -> None:
    torch.manual_seed(0)
    bank = make_bank(16, 64, "relu", True, torch.float32)
    x, dy = make_inputs(40, 16, torch.float32)
    got = compare(bank, x, dy, torch.full((40, 1), 2), 4)
    for name in ("w_in", "b_in", "w_out"):
        of_expert = got[name].view(4, -1).abs().sum(dim=1)
        assert of_expert[[0, 1, 3]].tolist() == [0, 0, 0]
        assert of_expert[2] > 0


@pytest.mark.parametrize("tokens", [0, 20])
def test_no_tokens_for_any_expert_here(tokens: int) -> None:
    bank = make_bank(16, 64, "reglu", True, torch.float32)
    x, dy = make_inputs(tokens, 16, torch.float32)
    ids = torch.full((tokens, 2), -1, device=DEVICE)
    got = run("triton", x, dy, ids, make_gates(ids), bank, 4)
    assert got["y"].shape == got["x"].shape == (tokens, 16)
    assert got["gate"].shape == (tokens, 2)
    assert all(t.abs().sum() == 0 for t in got.values())


def test_a_gate_never_scales_the_output() -> None:
    torch.manual_seed(0)
    bank = make_bank(16, 64, "relu", False, torch.float32)
    x, dy = make_inputs(30, 16, torch.float32)
    ids = choose(30, 4, 2).to(DEVICE)
    with_ones, with_sevens = (
        run("triton", x, dy, ids, (value * make_gates(ids)).detach().requires_grad_(), bank, 4) for value in (1, 7)
    )
    without = run("triton", x, dy, ids, None, bank, 4)
    assert all(torch.equal(with_ones[name], with_sevens[name]) for name in with_ones)
    assert all(torch.equal(with_ones[name], without[name]) for name in without)


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_and_a_recomputed_one_are_equal_bit_by_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    bank = make_bank(48, 4 * 24, "swiglu", True, dtype)
    x, dy = make_inputs(60, 48, dtype)
    ids = choose(60, 4, 2, skew=1.0).to(DEVICE)
    first, second = (run("triton", x, dy, ids, make_gates(ids), bank, 4) for _ in range(2))
    gates = make_gates(ids)
    args = (x, ids, gates, bank.tensors(), bank.activation, 4, "triton")
    recomputed = helpers.gradients(checkpoint(sparse_ffn, *args, use_reentrant=False), dy, x, gates, bank)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(first[name], recomputed[name]) for name in first)


@pytest.mark.parametrize(("activation", "kept"), [("relu", 1), ("squared_relu", 1), ("gelu", 1), ("reglu", 2)])
def test_what_is_kept_for_the_backward(activation: str, kept: int) -> None:
    bank = make_bank(16, 64, activation, False, torch.float32)
    x, _ = make_inputs(10, 16, torch.float32)
    given = {t.data_ptr() for t in (x, *bank.parameters())}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        sparse_ffn(x, choose(10, 4, 2).to(DEVICE), None, bank.tensors(), bank.activation, 4, "triton")
    floats = [t.shape for t in saved if t.is_floating_point() and t.data_ptr() not in given]
    assert floats == [(20, 16)] * kept  # rows x neurons of an expert


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(100, 6, 2), (300, 33, 5), (70, 2, 1), (3, 4, 4), (0, 4, 2)])
@pytest.mark.parametrize("elsewhere", [0.0, 0.4, 1.0])
def test_rows_are_copies_sorted_by_expert(tokens: int, experts: int, top_k: int, elsewhere: float) -> None:
    torch.manual_seed(0)
    ids = choose(tokens, experts, top_k)
    ids[torch.rand(ids.shape) < elsewhere] = -1
    rows = sort_copies(ids.to(DEVICE), experts)
    total = int((ids >= 0).sum())
    order = ids.flatten().remainder(experts + 1).argsort(stable=True)[:total]
    row_of_copy = torch.full((tokens * top_k,), -1)
    row_of_copy[order] = torch.arange(total)
    first = [0, *ids[ids >= 0].bincount(minlength=experts).cumsum(0).tolist()]
    tiles = [(e, row) for e in range(experts) for row in range(first[e], first[e + 1], rows.tile_size)]
    assert rows.token_C[:total].tolist() == (order // top_k).tolist()
    assert rows.row_TK.flatten().tolist() == row_of_copy.tolist()
    assert rows.first_row_E.tolist() == first
    assert list(zip(rows.tile_expert_M.tolist(), rows.tile_row_M.tolist(), strict=True))[: len(tiles)] == tiles
    assert rows.tile_expert_M[len(tiles) :].tolist() == [-1] * (len(rows.tile_expert_M) - len(tiles))


@pytest.mark.parametrize("granularity", [1, 8])
@pytest.mark.parametrize("router_update", ["straight_through", "avg_k"])
def test_a_switchable_network_does_not_depend_on_the_backend(router_update: str, granularity: int) -> None:
    results = []
    for backend in ("reference", "triton"):
        torch.manual_seed(0)
        settings = FFNSettings(32, 64, "relu", True, 4, 2, router_update, backend, granularity)
        ffn = SwitchableFFN(SimpleNamespace(params_dtype=torch.float32), settings)
        ffn.mode = "sparse"
        with torch.no_grad():
            for parameter in ffn.parameters():
                parameter.normal_(std=0.3)
        ffn = ffn.to(DEVICE)
        x, dy = make_inputs(30, 32, torch.float32)
        y, _ = ffn(x[:, None])
        y.backward(dy[:, None])
        weights = {name: p.grad for name, p in ffn.named_parameters() if p.grad is not None}
        results.append({"y": y, "x": x.grad, **weights})
    assert ("router.weight" in results[0]) == (router_update == "straight_through")
    assert_close(results[1], results[0], 1e-5)


class _NotRun:
    """Stands for a kernel: takes any launch and does nothing."""

    best_config = SimpleNamespace(kwargs={"BN": 32})

    def __getitem__(self, grid: object) -> Any:
        return lambda *args, **kwargs: None


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("up", "down", "down_grad", "weight_grad", "bias_grad", "gather_sum"):
        monkeypatch.setattr(triton_kernels, name, _NotRun())
    for name in ("_count", "_count_before", "_list_tiles", "_place"):
        monkeypatch.setattr(triton_routing, name, _NotRun())
    yield


def test_nothing_between_the_kernels_waits_for_the_device(no_kernels) -> None:
    # A fake tensor has no values: whatever asks for one raises.
    with FakeTensorMode():
        bank = helpers.make_bank(16, 64, "reglu", True, torch.float32)
        x = torch.randn(10, 16, requires_grad=True)
        ids = torch.zeros(10, 2, dtype=torch.int64)
        gates = torch.ones(10, 2, requires_grad=True)
        y = sparse_ffn(x, ids, gates, bank.tensors(), bank.activation, 4, "triton")
        y.backward(torch.ones_like(y))
    assert x.grad.shape == (10, 16) and gates.grad.shape == (10, 2) and bank.w_gate.grad.shape == (64, 16)


@pytest.mark.parametrize(
    ("kernel", "sizes", "widest"),
    [
        (triton_kernels.up, {"H": 2048, "N": 256, "ACT": "relu"}, 256),
        (triton_kernels.up, {"H": 2048, "N": 256, "ACT": "silu", "w_up": torch.empty(0)}, 64),
        (triton_kernels.down, {"H": 2048, "N": 128}, 256),
        (triton_kernels.down_grad, {"H": 4096, "N": 64, "ACT": "relu"}, 64),
        (triton_kernels.down_grad, {"H": 64, "N": 8, "ACT": "gelu"}, 16),
    ],
)
def test_tiles_worth_timing_fit_the_matmul(kernel: Any, sizes: dict[str, Any], widest: int) -> None:
    candidates = tuning.DOWN if kernel is triton_kernels.down else tuning.UP
    configs = [triton.Config(tile, num_warps=warps, num_stages=stages) for tile, warps, stages in candidates]
    given = {"BM": 128, "load": 4096, "x": torch.empty(0, dtype=torch.bfloat16), **sizes}
    found = kernel.early_config_prune(configs, {}, **given)
    assert found[0].kwargs["BN"] == widest
    assert all(widest // 2 <= config.kwargs["BN"] <= widest for config in found)


def test_choice_of_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert choose_backend("auto", cuda, torch.bfloat16) == (
        "triton",
        "sparse kernels: triton (the fastest there is for cuda, bfloat16)",
    )
    assert choose_backend("triton", cuda, torch.float32)[0] == "triton"
    assert choose_backend("auto", cuda, torch.float64)[0] == "torch"
    with pytest.raises(ConfigError, match=r"ssd.backend \(triton\) needs a CUDA device, .* on cpu: use auto or torch"):
        choose_backend("triton", cpu, torch.bfloat16)
    with pytest.raises(ConfigError, match=r"ssd.backend \(triton\) needs bf16, fp16 or fp32, not float64: use auto"):
        choose_backend("triton", cuda, torch.float64)
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the package triton, which is not installed: use auto or torch"):
        choose_backend("triton", cuda, torch.bfloat16)
    assert choose_backend("auto", cuda, torch.bfloat16) == (
        "torch",
        "sparse kernels: torch (triton, which is faster, needs the package triton, which is not installed; "
        "cuda, bfloat16)",
    )


def test_importing_the_package_needs_no_triton() -> None:
    code = "import sys; import ssd_megatron.ffn.kernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_slopes_that_are_read_off_the_output_belong_to_ungated_networks() -> None:
    known = {a.phi for a in ACTIVATIONS.values()}
    assert known == {"relu", "squared_relu", "gelu", "gelu_tanh", "silu"}
    assert set(triton_ffn.OUTPUT_IS_ENOUGH) < known
    assert not any(a.gated for a in ACTIVATIONS.values() if a.phi == "squared_relu")
