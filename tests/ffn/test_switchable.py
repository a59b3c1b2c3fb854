from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ssd_megatron.ffn.activations import ACTIVATIONS
from ssd_megatron.ffn.routers import expert_directions
from ssd_megatron.ffn.switchable import FFNSettings, SwitchableFFN
from tests.ffn.helpers import PHI, PLAIN, brute_force, relative_error

SETTINGS = FFNSettings(
    hidden_size=16,
    ffn_hidden_size=64,
    activation="relu",
    add_bias=True,
    num_experts=8,
    top_k=2,
    router_update="straight_through",
    backend="torch",
)


def make_ffn(**changes: object) -> SwitchableFFN:
    torch.manual_seed(0)
    ffn = SwitchableFFN(SimpleNamespace(params_dtype=torch.float64), replace(SETTINGS, **changes))
    with torch.no_grad():
        for parameter in ffn.bank.parameters():
            parameter.normal_(std=0.5)
        directions = expert_directions(ffn.bank.rows(), ffn.settings.num_experts)
        for name, value in ffn.router.initial_values(*directions).items():
            ffn.router.get_parameter(name).copy_(value)
    return ffn


def run(ffn: SwitchableFFN, mode: str, x: Tensor, dy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    ffn.mode = mode
    y, _ = ffn(x)
    given = {"x": x, **ffn.bank.neuron_parameters()}
    if ffn.router.learns and mode == "sparse":
        given["router"] = ffn.router.weight
    return y, dict(zip(given, torch.autograd.grad(y, list(given.values()), dy), strict=True))


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, dy = torch.randn(2, 9, 3, 16, generator=generator, dtype=torch.float64)
    return x.requires_grad_(), dy


@pytest.mark.parametrize("add_bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dense_mode_is_the_usual_network(activation: str, add_bias: bool) -> None:
    ffn, (x, dy) = make_ffn(activation=activation, add_bias=add_bias), inputs()
    bank = ffn.bank
    y, got = run(ffn, "dense", x, dy)
    up = x @ bank.w_in.T + (bank.b_in if add_bias else 0)
    if bank.w_gate is None:
        hidden = PHI[activation](up)
    else:
        hidden = PHI[activation](x @ bank.w_gate.T + (bank.b_gate if add_bias else 0)) * up
    wanted = hidden @ bank.w_out
    assert y.shape == x.shape
    assert relative_error(y, wanted) < 1e-12
    for name, gradient in zip(
        got, torch.autograd.grad(wanted, [x, *bank.neuron_parameters().values()], dy), strict=True
    ):
        assert relative_error(got[name], gradient) < 1e-12, name


def test_last_bias_is_returned_and_not_added() -> None:
    x, _ = inputs()
    ffn = make_ffn(add_bias=True)
    for mode in ("dense", "sparse"):
        ffn.mode = mode
        y, b_out = ffn(x)
        assert b_out is ffn.bank.b_out
        before = y.clone()
        with torch.no_grad():
            ffn.bank.b_out += 1
        assert torch.equal(ffn(x)[0], before)
    assert make_ffn(add_bias=False)(x)[1] is None


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("activation", ["relu", "squared_relu", "reglu", "swiglu"])
def test_all_experts_without_gate_gradient_equal_dense(activation: str, backend: str) -> None:
    ffn, (x, dy) = make_ffn(activation=activation, top_k=8, router_update="frozen", backend=backend), inputs()
    dense_y, dense = run(ffn, "dense", x, dy)
    sparse_y, sparse = run(ffn, "sparse", x, dy)
    assert relative_error(sparse_y, dense_y) < 1e-12
    assert sparse.keys() == dense.keys()
    for name in dense:
        assert relative_error(sparse[name], dense[name]) < 1e-12, name


@pytest.mark.parametrize("backend", PLAIN)
def test_straight_through_adds_a_router_gradient_and_a_part_of_dx(backend: str) -> None:
    ffn, (x, dy) = make_ffn(top_k=8, backend=backend), inputs()
    dense_y, dense = run(ffn, "dense", x, dy)
    y, got = run(ffn, "sparse", x, dy)
    assert relative_error(y, dense_y) < 1e-12
    for name in ffn.bank.neuron_parameters():
        assert relative_error(got[name], dense[name]) < 1e-12, name
    assert relative_error(got["x"], dense["x"]) > 1e-2


@pytest.mark.parametrize("backend", PLAIN)
def test_straight_through_gradients_are_those_of_brute_force(backend: str) -> None:
    ffn, (x, dy) = make_ffn(top_k=3, backend=backend), inputs()
    y, got = run(ffn, "sparse", x, dy)
    x_TH = x.flatten(0, 1)
    scores_TE = x_TH @ ffn.router.weight.T
    best = scores_TE.topk(3)
    p_TK = best.values.softmax(dim=1)
    wanted = brute_force(x_TH, best.indices, 1 + p_TK - p_TK.detach(), ffn.bank, 8)
    assert relative_error(y.flatten(0, 1), wanted) < 1e-12
    given = [x, *ffn.bank.neuron_parameters().values(), ffn.router.weight]
    for name, gradient in zip(got, torch.autograd.grad(wanted, given, dy.flatten(0, 1)), strict=True):
        assert relative_error(got[name], gradient) < 1e-12, name


def test_avg_k_routes_by_the_current_bank() -> None:
    ffn, (x, _) = make_ffn(router_update="avg_k", activation="reglu"), inputs()
    ffn.mode = "sparse"
    assert list(ffn.router.parameters()) == []
    for _ in range(2):
        means_EH = ffn.bank.w_gate.view(8, 8, 16).mean(dim=1)
        chosen = (x.flatten(0, 1) @ means_EH.T).topk(2).indices
        ffn(x)
        assert ffn.expert_load.tolist() == chosen.flatten().bincount(minlength=8).tolist()
        with torch.no_grad():
            ffn.bank.w_gate[:8] += x[0, 0]


def test_observer_sees_inputs_and_pre_activations_of_dense_mode_only() -> None:
    seen = []
    for activation in ("relu", "swiglu"):
        ffn, (x, _) = make_ffn(activation=activation), inputs()
        unobserved = ffn(x)[0]
        ffn.observer = lambda x_TH, pre_TF: seen.append((x_TH.clone(), pre_TF.clone()))
        assert torch.equal(ffn(x)[0], unobserved)
        x_TH, pre_TF = seen.pop()
        rows_FH, bias_F = (ffn.bank.w_in, ffn.bank.b_in) if activation == "relu" else (ffn.bank.w_gate, ffn.bank.b_gate)
        assert torch.equal(x_TH, x.flatten(0, 1))
        assert relative_error(pre_TF, x.flatten(0, 1) @ rows_FH.T + bias_F) < 1e-12
        assert (pre_TF < 0).any() and not pre_TF.requires_grad
        ffn.mode = "sparse"
        ffn(x)
        assert seen == []


def test_expert_load_counts_the_tokens_of_the_last_sparse_forward() -> None:
    ffn, (x, _) = make_ffn(), inputs()
    assert ffn.expert_load.tolist() == [0] * 8
    ffn.mode = "sparse"
    ffn(-x)
    ffn(x)
    chosen = ffn.router.route(x.flatten(0, 1)).expert_ids_TK
    assert ffn.expert_load.dtype == torch.int64
    assert ffn.expert_load.tolist() == [(chosen == e).sum().item() for e in range(8)]
    assert ffn.expert_load.sum() == 27 * 2


def test_wrong_use_is_caught() -> None:
    ffn, (x, _) = make_ffn(), inputs()
    ffn.mode = "both"
    with pytest.raises(AssertionError, match="both"):
        ffn(x)
    with pytest.raises(AssertionError, match="backend 'auto' is not resolved: use choose_backend"):
        make_ffn(backend="auto")
    with pytest.raises(AssertionError, match=r"\(64, 7\)"):
        make_ffn(num_experts=7)
