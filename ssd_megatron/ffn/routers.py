"""Routers: which experts a token goes to, and how the scores learn.

Shapes: T tokens, H hidden, F neurons, E experts, N neurons per expert, K experts per token.

The scores never scale an expert's output: a gate is 1 in the forward pass, and at most carries a gradient.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ssd_megatron.ffn.kernels import cpp_router

ROUTER_UPDATES = ("straight_through", "frozen", "avg_k")


Choice = Callable[[Tensor], Tensor]  # experts [T, K] int64 in, experts [T, K] out


class Routing(NamedTuple):
    """Where each token goes.

    Attributes:
        expert_ids_TK: int64, best first, no expert twice in a row; equal scores are settled alike in every run.
        gates_TK: 1 in value, with the router's gradient behind it; None when the router learns nothing.
    """

    expert_ids_TK: Tensor
    gates_TK: Tensor | None


def expert_scores(x_TH: Tensor, weight_EH: Tensor) -> Tensor:
    """x @ weight^T, [T, E], in at least fp32: bf16 scores would tie often, and ties would choose the experts."""
    dtype = torch.promote_types(x_TH.dtype, torch.float32)
    return F.linear(x_TH.to(dtype), weight_EH.to(dtype))


class _StraightThrough(torch.autograd.Function):
    """Chosen experts [T, K], and gates [T, K] that are 1 with the gradient of a softmax over the chosen scores.

    The same as gate = 1 + p - stop_gradient(p), in fewer steps and without an fp32 copy of x for the backward.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TH: Tensor, weight_EH: Tensor, top_k: int, chosen: Choice | None, backend: str
    ) -> tuple[Tensor, Tensor]:
        if backend == "cpp":
            scores_TE = cpp_router.expert_scores(x_TH, weight_EH)
            scores_TK, expert_ids_TK = cpp_router.top_k(scores_TE, top_k)
        else:
            scores_TE = expert_scores(x_TH, weight_EH)
            scores_TK, expert_ids_TK = scores_TE.topk(top_k, dim=1)
        if chosen is not None:
            expert_ids_TK = chosen(expert_ids_TK)
            scores_TK = scores_TE.gather(1, expert_ids_TK)
        p_TK = scores_TK.softmax(dim=1)
        ctx.save_for_backward(x_TH, weight_EH, expert_ids_TK, p_TK)
        ctx.backend = backend
        ctx.mark_non_differentiable(expert_ids_TK)
        return expert_ids_TK, torch.ones_like(p_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: None, dgates_TK: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x_TH, weight_EH, expert_ids_TK, p_TK = ctx.saved_tensors
        if ctx.backend == "cpp":
            dx_TH, dweight_EH = cpp_router.score_gradients(dgates_TK, p_TK, expert_ids_TK, x_TH, weight_EH)
            return dx_TH, dweight_EH, None, None, None
        dp_TK = p_TK * dgates_TK
        dscores_TK = dp_TK - p_TK * dp_TK.sum(dim=1, keepdim=True)
        dscores_TE = x_TH.new_zeros(len(x_TH), len(weight_EH)).scatter_(1, expert_ids_TK, dscores_TK.to(x_TH.dtype))
        return dscores_TE @ weight_EH, dscores_TE.T @ x_TH, None, None, None


_straight_through: Callable[..., tuple[Tensor, Tensor]] = _StraightThrough.apply


class Router(nn.Module):
    """Scores experts by a row each and takes the top_k.

    `router_update` says how the rows move after a switch has set them:

    - straight_through: by the gradient of gate = 1 + p - stop_gradient(p), p = softmax over the chosen scores
      (SSD, arXiv 2410.03440). With one expert per token p is constant and the gradient is zero.
    - frozen: not at all.
    - avg_k: the score is x . mean of the expert's rows, unnormalised, recomputed from the current bank (Avg-K, arXiv
      2305.13999). `weight` is not read.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        router_update: str,
        *,
        backend: str = "torch",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        assert router_update in ROUTER_UPDATES, router_update
        assert 1 <= top_k <= num_experts, (top_k, num_experts)
        self.num_experts = num_experts
        self.top_k = top_k
        self.router_update = router_update
        self.backend = backend
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, dtype=dtype, device=device))

    @property
    def reads_bank(self) -> bool:
        """Scores come from the bank's current rows instead of `weight`."""
        return self.router_update == "avg_k"

    def route(self, x_TH: Tensor, means_EH: Tensor | None = None, chosen: Choice | None = None) -> Routing:
        """Choose experts for each token.

        Args:
            x_TH: inputs of the feed-forward network.
            means_EH: mean row of each expert; given if and only if `reads_bank`.
            chosen: gets the experts with the best scores and returns those to take instead.
        """
        assert (means_EH is not None) == self.reads_bank, self.router_update
        if self.router_update == "straight_through":
            return Routing(*_straight_through(x_TH, self.weight, self.top_k, chosen, self.backend))
        with torch.no_grad():
            scores_TE = expert_scores(x_TH, self.weight if means_EH is None else means_EH)
            expert_ids_TK = scores_TE.topk(self.top_k, dim=1).indices
            return Routing(expert_ids_TK if chosen is None else chosen(expert_ids_TK), None)


@torch.no_grad()
def expert_directions(rows_FH: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """What routers are made of: the unit mean direction of each expert's L2-normalised rows, and every row's norm.

    Args:
        rows_FH: `bank.rows()` of one home or of all, any float dtype, expert e in rows [e * F/E, (e + 1) * F/E).
    Returns:
        [E, H] and [F], fp32.
    """
    rows_FH = rows_FH.float()
    directions_EH = F.normalize(rows_FH, dim=1).view(num_experts, -1, rows_FH.shape[1]).mean(dim=1)
    return F.normalize(directions_EH, dim=1), torch.linalg.vector_norm(rows_FH, dim=1)


def router_weights(directions_EH: Tensor, norms_F: Tensor) -> Tensor:
    """Router rows [E, H] at a switch: the directions of all experts, brought to one common norm.

    The common norm makes the top-k a top-k by cosine (SSD, arXiv 2410.03440); its value, which the paper does not
    give, only sets the temperature of the straight-through softmax. Ours is the mean norm of the bank's rows: a score
    is then what a typical neuron pointing the expert's way would see, so the temperature follows the layer's own
    scale as training goes on, and an Adam step turns a router row about as far as a neuron's row.
    """
    return directions_EH * norms_F.mean()


def router_weights_from_bank(rows_FH: Tensor, num_experts: int) -> Tensor:
    """Router rows [E, H] fp32 from the rows [F, H] of all homes."""
    return router_weights(*expert_directions(rows_FH, num_experts))
