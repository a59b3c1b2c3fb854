from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ssd_megatron.errors import ConfigError
from ssd_megatron.ffn.activations import ACTIVATIONS
from ssd_megatron.ffn.bank import NeuronBank, NeuronTensors
from ssd_megatron.ffn.kernels import choose_backend, cpp_build, sparse_ffn, workspace
from tests.ffn.helpers import FAST, PLAIN, assert_close, brute_force, choose, gradients, make_bank, make_inputs, run

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("add_bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_output_and_gradients_are_those_of_brute_force(activation: str, add_bias: bool, backend: str) -> None:
    torch.manual_seed(0)
    bank = make_bank(12, 48, activation, add_bias, torch.float64)
    x, dy = make_inputs(21, 12, torch.float64)
    ids, gates = choose(21, 6, 2), torch.ones(21, 2, dtype=torch.float64, requires_grad=True)
    wanted = gradients(brute_force(x, ids, gates, bank, 6), dy, x, gates, bank)
    assert_close(run(backend, x, dy, ids, gates, bank, 6), wanted, 1e-12)


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_scaled_gates_multiply_outputs_and_have_the_brute_force_gradient(activation: str, backend: str) -> None:
    torch.manual_seed(0)
    bank = make_bank(12, 48, activation, True, torch.float64)
    x, dy = make_inputs(21, 12, torch.float64)
    ids, gates = choose(21, 6, 2), torch.rand(21, 2, dtype=torch.float64, requires_grad=True)
    wanted = gradients(brute_force(x, ids, gates, bank, 6), dy, x, gates, bank)
    assert_close(run(backend, x, dy, ids, gates, bank, 6, scaled=True), wanted, 1e-12)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("backend", PLAIN)
def test_finite_differences(activation: str, backend: str) -> None:
    torch.manual_seed(0)
    bank = make_bank(5, 12, activation, True, torch.float64)
    x, _ = make_inputs(7, 5, torch.float64)
    ids = choose(7, 4, 2)
    given = [t for t in bank.tensors() if t is not None]

    def run(x: Tensor, *given: Tensor) -> Tensor:
        left = iter(given)
        tensors = NeuronTensors(*(None if t is None else next(left) for t in bank.tensors()))
        return sparse_ffn(x, ids, None, tensors, bank.activation, 4, backend)

    assert torch.autograd.gradcheck(run, (x, *given), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "skew"),
    [(256, 16, 4, 0.0), (515, 32, 8, 2.0), (301, 6, 1, 1.0), (130, 8, 2, 50.0), (64, 4, 4, 0.0), (1, 16, 3, 0.0)],
)
@pytest.mark.parametrize(("activation", "add_bias"), [("relu", False), ("squared_relu", True), ("reglu", True)])
@pytest.mark.parametrize("backend", FAST)
def test_any_load_gives_what_reference_gives(
    backend: str,
    activation: str,
    add_bias: bool,
    tokens: int,
    experts: int,
    top_k: int,
    skew: float,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(1)
    bank = make_bank(64, experts * 24, activation, add_bias, dtype)
    x, dy = make_inputs(tokens, 64, dtype)
    ids, gates = choose(tokens, experts, top_k, skew), torch.ones(tokens, top_k, requires_grad=True)
    got, wanted = (run(name, x, dy, ids, gates, bank, experts) for name in (backend, "reference"))
    assert_close(got, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("backend", FAST)
def test_experts_without_tokens_get_zero_gradients(backend: str) -> None:
    torch.manual_seed(0)
    bank = make_bank(16, 64, "relu", True, torch.float32)
    x, dy = make_inputs(40, 16, torch.float32)
    got = run(backend, x, dy, torch.full((40, 1), 2), None, bank, 4)
    for name in ("w_in", "b_in", "w_out"):
        of_expert = got[name].view(4, -1).abs().sum(dim=1)
        assert of_expert[[0, 1, 3]].tolist() == [0, 0, 0]
        assert of_expert[2] > 0


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_no_tokens_at_all(backend: str) -> None:
    bank = make_bank(16, 64, "reglu", True, torch.float32)
    x, dy = make_inputs(0, 16, torch.float32)
    gates = torch.ones(0, 2, requires_grad=True)
    got = run(backend, x, dy, torch.empty(0, 2, dtype=torch.int64), gates, bank, 4)
    assert got["y"].shape == got["x"].shape == (0, 16)
    assert got["gate"].shape == (0, 2)
    assert all(got[name].abs().sum() == 0 for name in bank.neuron_parameters())


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_a_gate_never_scales_the_output(backend: str) -> None:
    torch.manual_seed(0)
    bank = make_bank(16, 64, "relu", False, torch.float32)
    x, dy = make_inputs(30, 16, torch.float32)
    ids = choose(30, 4, 2)
    ones, sevens = (torch.full((30, 2), value, requires_grad=True) for value in (1.0, 7.0))
    with_ones, with_sevens = (run(backend, x, dy, ids, gates, bank, 4) for gates in (ones, sevens))
    without = run(backend, x, dy, ids, None, bank, 4)
    assert all(torch.equal(with_ones[name], with_sevens[name]) for name in with_ones)
    assert all(torch.equal(with_ones[name], without[name]) for name in without)


@pytest.mark.parametrize("backend", FAST)
def test_two_runs_are_equal_bit_by_bit(backend: str) -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        bank = make_bank(64, 256, "reglu", True, dtype)
        x, dy = make_inputs(700, 64, dtype)
        ids, gates = choose(700, 8, 3, skew=1.0), torch.ones(700, 3, requires_grad=True)
        first, second = (run(backend, x, dy, ids, gates, bank, 8) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", FAST)
def test_backward_may_run_twice(backend: str) -> None:
    torch.manual_seed(0)
    bank = make_bank(16, 64, "squared_relu", True, torch.float32)
    x, dy = make_inputs(50, 16, torch.float32)
    y = sparse_ffn(x, choose(50, 8, 2), None, bank.tensors(), bank.activation, 8, backend)
    first, second = (torch.autograd.grad(y, [x, bank.w_in, bank.w_out], dy, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def two_layers() -> Iterator[tuple[list[NeuronBank], Tensor, Tensor, list[Tensor]]]:
    torch.manual_seed(0)
    banks = [make_bank(32, 128, "reglu", True, torch.float32) for _ in range(2)]
    x, dy = make_inputs(200, 32, torch.float32)
    yield banks, x, dy, [choose(200, 8, 2, skew) for skew in (0.0, 2.0)]


def run_layers(
    banks: list[NeuronBank], x: Tensor, ids: list[Tensor], recompute: bool, backend: str = "torch"
) -> Tensor:
    for bank, ids_TK in zip(banks, ids, strict=True):
        gates = torch.ones(ids_TK.shape, requires_grad=True)
        args = (x, ids_TK, gates, bank.tensors(), bank.activation, 8, backend)
        x = x + (checkpoint(sparse_ffn, *args, use_reentrant=False) if recompute else sparse_ffn(*args))
    return x


def layer_gradients(banks: list[NeuronBank], y: Tensor, x: Tensor, dy: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y, [x, *(p for bank in banks for p in bank.neuron_parameters().values())], dy))


@pytest.mark.parametrize("backend", FAST)
def test_recomputed_activations_give_the_same_bits(two_layers, backend: str) -> None:
    banks, x, dy, ids = two_layers
    kept = layer_gradients(banks, run_layers(banks, x, ids, recompute=False, backend=backend), x, dy)
    recomputed = layer_gradients(banks, run_layers(banks, x, ids, recompute=True, backend=backend), x, dy)
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


@pytest.mark.parametrize("backend", FAST)
def test_whole_stack_recomputed_in_one_piece_gives_the_same_bits(two_layers, backend: str) -> None:
    banks, x, dy, ids = two_layers
    kept = layer_gradients(banks, run_layers(banks, x, ids, recompute=False, backend=backend), x, dy)
    y = checkpoint(lambda x: run_layers(banks, x, ids, recompute=False, backend=backend), x, use_reentrant=False)
    assert all(torch.equal(a, b) for a, b in zip(kept, layer_gradients(banks, y, x, dy), strict=True))


@pytest.mark.parametrize("backend", FAST)
def test_an_evaluation_between_forward_and_backward_changes_nothing(
    two_layers, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    banks, x, dy, ids = two_layers
    monkeypatch.setattr(workspace, "_workspace", {})
    with torch.inference_mode():  # scratch memory first made here must serve training too
        run_layers(banks, torch.randn(200, 32), ids, recompute=False, backend=backend)
    wanted_y = run_layers(banks, x, ids, recompute=False, backend=backend)
    wanted = layer_gradients(banks, wanted_y, x, dy)
    y = run_layers(banks, x, ids, recompute=False, backend=backend)
    with torch.no_grad():
        run_layers(banks, torch.randn(200, 32), ids, recompute=False, backend=backend)
    with torch.inference_mode():
        run_layers(banks, torch.randn(200, 32), ids, recompute=False, backend=backend)
    assert torch.equal(y, wanted_y)
    assert all(torch.equal(a, b) for a, b in zip(layer_gradients(banks, y, x, dy), wanted, strict=True))


def test_workspace_is_shared_and_stops_growing(two_layers, monkeypatch: pytest.MonkeyPatch) -> None:
    banks, x, dy, ids = two_layers
    buffers: dict = {}
    monkeypatch.setattr(workspace, "_workspace", buffers)
    sizes = []
    for _ in range(3):
        layer_gradients(banks, run_layers(banks, x, ids, recompute=False), x, dy)
        run_layers(banks, x[:10], [i[:10] for i in ids], recompute=False)
        sizes.append({key: buffer.numel() for key, buffer in buffers.items()})
    assert sizes[0] == sizes[1] == sizes[2]
    assert {name for name, _ in buffers} == {"out", "rows", "hidden", "dy", "product"}
    # 400 copies of tokens of 32 values, and padding.
    assert 400 * 32 <= buffers["out", torch.float32].numel() <= 600 * 32


def test_choice_of_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(cpp_build, "lacking", lambda dtype: "a C++ compiler" if dtype == torch.float32 else None)
    assert choose_backend("auto", cpu, torch.float32) == (
        "torch",
        "sparse kernels: torch (cpp, which takes about two thirds of its time, needs a C++ compiler; cpu, float32)",
    )
    assert choose_backend("auto", cpu, torch.bfloat16) == (
        "cpp",
        "sparse kernels: cpp (the fastest there is for cpu, bfloat16)",
    )
    small, large = (256, 2048), (512, 2048)
    assert choose_backend("auto", cpu, torch.bfloat16, small)[0] == "cpp"
    assert choose_backend("auto", cpu, torch.bfloat16, large) == (
        "torch",
        "sparse kernels: torch (faster than cpp for experts of 512 x 2048; cpu, bfloat16)",
    )
    assert choose_backend("cpp", cpu, torch.bfloat16, large)[0] == "cpp"
    with pytest.raises(ConfigError, match=r"ssd.backend \(cpp\) needs a C\+\+ compiler: use auto or torch"):
        choose_backend("cpp", cpu, torch.float32)
    assert choose_backend("reference", cpu, torch.bfloat16) == (
        "reference",
        "sparse kernels: reference (as asked; cpu, bfloat16)",
    )
    with pytest.raises(
        ConfigError, match=r"ssd.backend \(cuda\) is unknown: use one of auto, reference, torch, cpp, triton"
    ):
        choose_backend("cuda", cpu, torch.float32)
