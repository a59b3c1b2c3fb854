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

ROUTER_UPDATES = ("straight_through", "frozen", "avg_k")


class Routing(NamedTuple):
    """Where each token goes.

    Attributes:
        expert_ids_TK: int64, best first, no expert twice in a row.
        gates_TK: 1 in value, with the router's gradient behind it; None when the router learns nothing.
    """

    expert_ids_TK: Tensor
    gates_TK: Tensor | None


class _Scores(torch.autograd.Function):
    """x @ weight^T in at least fp32, its gradient in x's dtype: no fp32 copy of x is kept for the backward."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, weight_EH: Tensor) -> Tensor:
        ctx.save_for_backward(x_TH, weight_EH)
        # bf16 scores would tie often, and ties would choose the experts.
        dtype = torch.promote_types(x_TH.dtype, torch.float32)
        return F.linear(x_TH.to(dtype), weight_EH.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_TE: Tensor) -> tuple[Tensor, Tensor]:
        x_TH, weight_EH = ctx.saved_tensors
        d_TE = d_TE.to(x_TH.dtype)
        return d_TE @ weight_EH.to(x_TH.dtype), (d_TE.T @ x_TH).to(weight_EH.dtype)


expert_scores: Callable[[Tensor, Tensor], Tensor] = _Scores.apply  # (x_TH, weight_EH) -> [T, E]


def best_experts(scores_TE: Tensor, top_k: int) -> Tensor:
    """Ids [T, K] of the experts with the highest scores, best first; of equal scores the lower id, on every device."""
    return scores_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()


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
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        assert router_update in ROUTER_UPDATES, router_update
        assert 1 <= top_k <= num_experts, (top_k, num_experts)
        self.num_experts = num_experts
        self.top_k = top_k
        self.router_update = router_update
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, dtype=dtype, device=device))

    def route(self, x_TH: Tensor, rows_FH: Tensor | None = None) -> Routing:
        """Choose experts for each token.

        Args:
            x_TH: inputs of the feed-forward network.
            rows_FH: `bank.rows()`; only avg_k reads it.
        """
        if self.router_update != "straight_through":
            with torch.no_grad():
                return Routing(best_experts(expert_scores(x_TH, self._rows(rows_FH)), self.top_k), None)
        scores_TE = expert_scores(x_TH, self.weight)
        expert_ids_TK = best_experts(scores_TE.detach(), self.top_k)
        p_TK = scores_TE.gather(1, expert_ids_TK).softmax(dim=-1)
        return Routing(expert_ids_TK, 1 + p_TK - p_TK.detach())

    @torch.no_grad()
    def ranking(self, x_TH: Tensor, rows_FH: Tensor) -> Tensor:
        """Ids [T, E] of all experts, best first."""
        weight_EH = self._rows(rows_FH) if self.router_update == "avg_k" else self.weight
        return best_experts(expert_scores(x_TH, weight_EH), self.num_experts)

    def _rows(self, rows_FH: Tensor | None) -> Tensor:
        if self.router_update == "frozen":
            return self.weight
        assert rows_FH is not None, "avg_k scores from the bank's rows"
        rows_ENH = rows_FH.view(self.num_experts, -1, rows_FH.shape[1])
        return rows_ENH.mean(dim=1, dtype=torch.promote_types(rows_FH.dtype, torch.float32))


@torch.no_grad()
def router_weights_from_bank(rows_FH: Tensor, num_experts: int) -> Tensor:
    """Router rows at a switch: the mean of each expert's L2-normalised rows, all brought to one common norm.

    The common norm makes the top-k a top-k by cosine (SSD, arXiv 2410.03440); its value, which the paper does not
    give, only sets the temperature of the straight-through softmax. Ours is the mean norm of the bank's rows: a score
    is then what a typical neuron pointing the expert's way would see, so the temperature follows the layer's own
    scale as training goes on, and an Adam step turns a router row about as far as a neuron's row.

    Args:
        rows_FH: `bank.rows()`, any float dtype, expert e in rows [e * F/E, (e + 1) * F/E).
    Returns:
        [E, H] fp32.
    """
    rows_FH = rows_FH.float()
    directions_EH = F.normalize(rows_FH, dim=1).view(num_experts, -1, rows_FH.shape[1]).mean(dim=1)
    common_norm: Tensor = torch.linalg.vector_norm(rows_FH, dim=1).mean()
    return F.normalize(directions_EH, dim=1) * common_norm
