from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ssd_megatron.errors import ConfigError
from ssd_megatron.ffn.router_kinds import expert_scores
from ssd_megatron.ffn.routers import Router, Seen, router_weights_from_bank
from tests.ffn.helpers import relative_error


def make_router(top_k: int, update: str, dtype: torch.dtype = torch.float64) -> Router:
    router = Router(16, 8, top_k, update, dtype=dtype)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    return router


@pytest.mark.parametrize("update", ["straight_through", "frozen"])
def test_bf16_is_scored_in_fp32_so_that_near_ties_are_settled_by_the_scores(update: str) -> None:
    torch.manual_seed(0)
    router = make_router(3, update, torch.bfloat16)
    x = torch.randn(2000, 16).bfloat16()
    assert expert_scores(x, router.weight).dtype == torch.float32
    wanted = (x.double() @ router.weight.double().T).topk(3).indices
    assert (router.route(x).expert_ids_TK == wanted).all()
    assert ((x @ router.weight.T).topk(3).indices != wanted).any()


def test_equal_scores_are_settled_alike_in_every_run() -> None:
    router = make_router(3, "straight_through", torch.float32)
    torch.nn.init.ones_(router.weight)
    x = torch.randn(100, 16)
    first = router.route(x).expert_ids_TK
    assert torch.equal(router.route(x).expert_ids_TK, first)
    assert torch.equal(router.route(x[50:]).expert_ids_TK, first[50:])
    assert all(len(set(ids)) == 3 for ids in first.tolist())


def test_gradients_of_bf16_are_bf16() -> None:
    torch.manual_seed(0)
    router = make_router(3, "straight_through", torch.bfloat16)
    exact = make_router(3, "straight_through", torch.float64)
    exact.load_state_dict(router.state_dict())
    x, d_TK = torch.randn(50, 16).bfloat16().requires_grad_(), torch.randn(50, 3)
    exact_x = x.detach().double().requires_grad_()
    dx, dweight = torch.autograd.grad(router.route(x).gates_TK, (x, router.weight), d_TK)
    assert dx.dtype == dweight.dtype == torch.bfloat16
    wanted = torch.autograd.grad(exact.route(exact_x).gates_TK, (exact_x, exact.weight), d_TK.double())
    assert relative_error(dx, wanted[0]) < 1e-2
    assert relative_error(dweight, wanted[1]) < 1e-2


def test_straight_through_gate_is_one_and_carries_the_gradient_of_the_softmax() -> None:
    torch.manual_seed(0)
    router = make_router(3, "straight_through")
    x = torch.randn(20, 16, dtype=torch.float64).requires_grad_()
    routing = router.route(x)
    assert routing.gates_TK is not None
    assert (routing.gates_TK == 1).all()
    d_TK = torch.randn(20, 3, dtype=torch.float64)
    got = torch.autograd.grad(routing.gates_TK, (x, router.weight), d_TK)

    scores_TE = x @ router.weight.T
    assert torch.equal(routing.expert_ids_TK, scores_TE.topk(3).indices)
    p_TK = scores_TE.gather(1, routing.expert_ids_TK).softmax(dim=1)
    for a, b in zip(got, torch.autograd.grad(p_TK, (x, router.weight), d_TK), strict=True):
        assert relative_error(a, b) < 1e-12


def test_one_expert_per_token_gives_the_router_exactly_no_gradient() -> None:
    torch.manual_seed(0)
    router = make_router(1, "straight_through")
    routing = router.route(torch.randn(20, 16, dtype=torch.float64))
    assert routing.gates_TK is not None
    (gradient,) = torch.autograd.grad(routing.gates_TK, router.weight, torch.randn(20, 1, dtype=torch.float64))
    assert gradient.abs().max() == 0


def test_frozen_router_chooses_the_same_and_learns_nothing() -> None:
    torch.manual_seed(0)
    router = make_router(3, "straight_through")
    frozen = make_router(3, "frozen")
    frozen.load_state_dict(router.state_dict())
    x = torch.randn(20, 16, dtype=torch.float64).requires_grad_()
    routing = frozen.route(x)
    assert routing.gates_TK is None
    assert not routing.expert_ids_TK.requires_grad
    assert torch.equal(routing.expert_ids_TK, router.route(x).expert_ids_TK)


def test_avg_k_follows_the_current_rows() -> None:
    torch.manual_seed(0)
    router, x = make_router(2, "avg_k"), torch.randn(20, 16, dtype=torch.float64)
    rows_FH = torch.randn(32, 16, dtype=torch.float64)
    for _ in range(2):
        means_EH = torch.stack([rows_FH[4 * e : 4 * e + 4].mean(dim=0) for e in range(8)])
        routing = router.route(x, Seen(means_EH=means_EH))
        assert torch.equal(routing.expert_ids_TK, (x @ means_EH.T).topk(2).indices)
        assert routing.gates_TK is None
        rows_FH = rows_FH.roll(4, dims=0)
    with pytest.raises(AssertionError, match="avg_k"):
        router.route(x)


def test_weights_from_bank_point_to_the_mean_direction_with_the_mean_norm() -> None:
    torch.manual_seed(0)
    rows_FH = torch.randn(32, 16) * torch.rand(32, 1)
    weights_EH = router_weights_from_bank(rows_FH, 8)
    for e in range(8):
        mean_H = sum(row / row.norm() for row in rows_FH[4 * e : 4 * e + 4]) / 4
        assert F.cosine_similarity(weights_EH[e], mean_H, dim=0) > 1 - 1e-6
        assert weights_EH[e].norm().item() == pytest.approx(rows_FH.norm(dim=1).mean().item(), rel=1e-5)
    assert router_weights_from_bank(rows_FH.bfloat16(), 8).dtype == torch.float32


def test_impossible_routers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"router_update \(learned\) must be one of straight_through, frozen, avg_k"):
        Router(16, 8, 2, "learned")
    with pytest.raises(ConfigError, match=r"kind \(best\) must be one of centroid, avg_k"):
        Router(16, 8, 2, "frozen", kind="best")
    with pytest.raises(ConfigError, match=r"top_k \(9\) must be between 1 and num_experts \(8\)"):
        Router(16, 8, 9, "frozen")
    with pytest.raises(ConfigError, match=r"num_experts \(8\) must be a square with kind pkm: try 4 or 9"):
        Router(16, 8, 2, "straight_through", kind="pkm")


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that operators give."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize(("kind", "elements"), [("centroid", 2**16 * 4), ("vanilla", 2**16 * 4), ("mlp", 2**32)])
def test_initial_values_are_no_larger_than_the_router(kind: str, elements: int) -> None:
    """With 65,536 experts, on the device that holds no values."""
    with torch.device("meta"):
        router = Router(4, 2**16, 4, "frozen", kind=kind)
        directions_EH, norms_F = torch.empty(2**16, 4), torch.empty(2**16)
    with LargestTensor() as largest:
        router.initial_values(directions_EH, norms_F)
    assert largest.elements == elements
