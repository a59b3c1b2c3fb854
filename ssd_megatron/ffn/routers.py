"""Routers: which experts a token goes to, and how the scores learn (router_kinds.py says what kinds there are).

Shapes: T tokens (or tiles), H hidden, F neurons, E experts, N neurons per expert, K experts per token.

Scores do not scale an expert's output, but for one kind: a gate is 1 in the forward pass, and at most carries a
gradient.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ssd_megatron.errors import ConfigError
from ssd_megatron.ffn.activations import Activation
from ssd_megatron.ffn.bank import NeuronTensors
from ssd_megatron.ffn.kernels import cpp_router
from ssd_megatron.ffn.kernels.decode import MOST_TOKENS
from ssd_megatron.ffn.router_kinds import (
    KINDS,
    activation_mass,
    expert_scores,
    half_keys,
    hashed_experts,
    mlp_scores,
    neuron_scores,
    product_scores,
)
from ssd_megatron.ffn.router_losses import BIAS_WEIGHT, balance_loss, bias_loss, with_loss, z_loss

ROUTER_UPDATES = ("straight_through", "frozen", "avg_k")

Choice = Callable[[Tensor], Tensor]  # experts [T, K] int64 in, experts [T, K] out


class Routing(NamedTuple):
    """Where each token goes.

    Attributes:
        expert_ids_TK: int64, best first, no expert twice in a row; equal scores are settled alike in every run.
        gates_TK: with the router's gradient behind them; None when the router learns nothing.
        x_TH: what was routed; a straight-through centroid adds its gradient to the one that comes back here.
        scaled: outputs are multiplied by the gates; else they are 1 in value.
    """

    expert_ids_TK: Tensor
    gates_TK: Tensor | None
    x_TH: Tensor
    scaled: bool = False


class Seen(NamedTuple):
    """What a router may look at beside the tokens' inputs; of these it needs what its kind `reads`.

    Attributes:
        means_EH: current mean row of each expert.
        neurons: the bank of all homes, without gradients.
        activation: the network's.
        keys_T: int64, ids or positions of the tokens.
        position_E: int64, where the expert with each number lies that is the same on every layout.
        sequences: so many take turns in the rows.
    """

    means_EH: Tensor | None = None
    neurons: NeuronTensors | None = None
    activation: Activation | None = None
    keys_T: Tensor | None = None
    position_E: Tensor | None = None
    sequences: int = 1


NOTHING_ELSE = Seen()


class _StraightThrough(torch.autograd.Function):
    """Chosen experts [T, K], gates [T, K] that are 1 with the gradient of a softmax over the chosen scores, and x.

    The same as gate = 1 + p - stop_gradient(p), in fewer steps and without an fp32 copy of x for the backward, which
    adds its gradient of x to the one of the x that it has returned.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        weight_EH: Tensor,
        bias_E: Tensor | None,
        top_k: int,
        chosen: Choice | None,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if backend == "cpp":
            scores_TE = cpp_router.expert_scores(x_TH, weight_EH)
            expert_ids_TK = _best(scores_TE, bias_E, top_k, chosen, cpp_router.top_k)
            p_TK = cpp_router.softmax(scores_TE, expert_ids_TK)
        else:
            scores_TE = expert_scores(x_TH, weight_EH)
            expert_ids_TK = _best(scores_TE, bias_E, top_k, chosen)
            p_TK = scores_TE.gather(1, expert_ids_TK).softmax(dim=1)
        ctx.save_for_backward(x_TH, weight_EH, expert_ids_TK, p_TK)
        ctx.backend = backend
        ctx.mark_non_differentiable(expert_ids_TK)
        ctx.set_materialize_grads(False)
        return expert_ids_TK, torch.ones_like(p_TK), x_TH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: None, dgates_TK: Tensor | None, dx_TH: Tensor | None) -> tuple[Tensor | None, ...]:
        x_TH, weight_EH, expert_ids_TK, p_TK = ctx.saved_tensors
        if dgates_TK is None:
            return dx_TH, None, None, None, None, None
        if ctx.backend == "cpp":
            dx_TH, dweight_EH = cpp_router.score_gradients(dgates_TK, p_TK, expert_ids_TK, x_TH, weight_EH, dx_TH)
            return dx_TH, dweight_EH, None, None, None, None
        dp_TK = p_TK * dgates_TK
        dscores_TK = dp_TK - p_TK * dp_TK.sum(dim=1, keepdim=True)
        dscores_TE = x_TH.new_zeros(len(x_TH), len(weight_EH)).scatter_(1, expert_ids_TK, dscores_TK.to(x_TH.dtype))
        own_TH = dscores_TE @ weight_EH
        return own_TH if dx_TH is None else own_TH.add_(dx_TH), dscores_TE.T @ x_TH, None, None, None, None


_straight_through: Callable[..., tuple[Tensor, Tensor, Tensor]] = _StraightThrough.apply


def _top_k(scores_TE: Tensor, top_k: int) -> Tensor:
    return scores_TE.topk(top_k, dim=1).indices


@torch.no_grad()
def _best(
    scores_TE: Tensor,
    bias_E: Tensor | None,
    top_k: int,
    chosen: Choice | None,
    best: Callable[[Tensor, int], Tensor] = _top_k,
) -> Tensor:
    """The experts with the best scores, biases added.

    Args:
        best: picks them where there are no biases.
    """
    expert_ids_TK = best(scores_TE, top_k) if bias_E is None else _top_k(scores_TE + bias_E, top_k)
    return expert_ids_TK if chosen is None else chosen(expert_ids_TK)


class Router(nn.Module):
    """Chooses the top_k of the experts for each token, by its kind.

    A centroid router's rows move after a switch has set them as `router_update` says:

    - straight_through: by the gradient of gate = 1 + p - stop_gradient(p), p = softmax over the chosen scores
      (SSD, arXiv 2410.03440). With one expert per token p is constant and the gradient is zero.
    - frozen: not at all.
    - avg_k: another name for the kind avg_k, whose scores are x . mean of the expert's current rows, unnormalised.

    Kind pkm learns straight through as well, switch by gates that scale the outputs: p = softmax over all scores, with
    the losses of router_losses.py; the other kinds learn nothing here.

    Args:
        kind: a name in KINDS.
        balance, z: weights of the losses of the kind switch.
        balance_bias: each expert has a bias that enters the choice alone and follows the load.
        salt: which of the hashes.
        backend: of the network's kernels; "cpp" has some for a straight-through centroid router.
    Raises:
        ConfigError: there is no such router.

    Attributes:
        loss_weight: what the gradient of a mean over this pass's tokens is to be multiplied by; the engine sets it.
    """

    weight: nn.Parameter
    mix: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        router_update: str,
        *,
        kind: str = "centroid",
        balance: float = 0.0,
        z: float = 0.0,
        balance_bias: bool = False,
        salt: int = 0,
        backend: str = "torch",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for name, value, choices in (("router_update", router_update, ROUTER_UPDATES), ("kind", kind, tuple(KINDS))):
            if value not in choices:
                raise ConfigError(f"{name} ({value}) must be one of {', '.join(choices)}")
        if not 1 <= top_k <= num_experts:
            raise ConfigError(f"top_k ({top_k}) must be between 1 and num_experts ({num_experts})")
        self.num_experts = num_experts
        self.top_k = top_k
        self.name = "avg_k" if router_update == "avg_k" and kind == "centroid" else kind
        self.kind = KINDS[self.name]
        self.straight_through = self.name == "pkm" or (self.name == "centroid" and router_update == "straight_through")
        self.salt = salt
        self.backend = backend
        self.loss_weight = 1.0
        self._balance, self._z = balance, z
        for name, shape in self.kind.shapes(hidden_size, num_experts).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype, device=device)))
        bias = nn.Parameter(torch.empty(num_experts, dtype=dtype, device=device)) if balance_bias else None
        self.register_parameter("bias", bias)
        if balance_bias and (self.kind.by_identity or not self.learns):
            raise ConfigError(
                f"balance_bias (True) needs a router that learns a row per expert, not {self.name}: use switch or a "
                "straight-through centroid, or leave it out"
            )

    @property
    def learns(self) -> bool:
        """Gates carry a gradient."""
        return self.straight_through or self.kind.scales

    def scoring_rows(self, seen: Seen) -> Tensor | None:
        """Rows [E, H] whose products with inputs, `bias` added, are all that this kind goes by; None of others."""
        return self.weight if self.name == "centroid" else seen.means_EH

    def route(self, x_TH: Tensor, seen: Seen = NOTHING_ELSE, chosen: Choice | None = None) -> Routing:
        """Choose experts for each token.

        Args:
            x_TH: inputs of the feed-forward network, any float dtype.
            seen: what a kind looks at beside them.
            chosen: gets the experts with the best scores and returns those to take instead.
        Returns:
            ids [T, K] and gates [T, K] of the chosen experts, and the inputs again.
        """
        if self.straight_through and self.name == "centroid":
            backend = self.backend if len(x_TH) > MOST_TOKENS else "torch"  # which starts sooner
            expert_ids_TK, gates_TK, x_TH = _straight_through(x_TH, self.weight, self.bias, self.top_k, chosen, backend)
            return Routing(expert_ids_TK, self._follow_load(gates_TK, expert_ids_TK), x_TH)
        if self.kind.scales:
            return self._scaled(x_TH, seen, chosen)
        if self.straight_through:
            assert chosen is None, self.name
            scores_TE = product_scores(x_TH, self.weight)
            numbers_TK = _best(scores_TE, None, self.top_k, None)
            p_TK = scores_TE.gather(1, numbers_TK).softmax(dim=1)
            gates_TK = 1 + (p_TK - p_TK.detach())
            return Routing(self._positions(numbers_TK, seen), gates_TK, x_TH)
        with torch.no_grad():
            expert_ids_TK = self._positions(self._chosen_without_gradient(x_TH, seen), seen)
            return Routing(expert_ids_TK if chosen is None else chosen(expert_ids_TK), None, x_TH)

    def initial_values(self, directions_EH: Tensor, norms_F: Tensor) -> dict[str, Tensor]:
        """Parameters by name as a switch sets them, fp32.

        Args:
            directions_EH, norms_F: see `expert_directions`; in the order in which this kind knows experts.
        """
        weight_EH = router_weights(directions_EH, norms_F)
        values = {"weight": half_keys(weight_EH) if self.name == "pkm" else weight_EH}
        if self.name == "mlp":
            values["mix"] = torch.eye(self.num_experts, device=weight_EH.device)
        values["bias"] = weight_EH.new_zeros(self.num_experts)
        return {name: values[name] for name, _ in self.named_parameters()}

    def _scaled(self, x_TH: Tensor, seen: Seen, chosen: Choice | None) -> Routing:
        scores_TE = expert_scores(x_TH, self.weight)
        expert_ids_TK = _best(scores_TE, self.bias, self.top_k, chosen)
        p_TE = scores_TE.softmax(dim=1)
        gates_TK = p_TE.gather(1, expert_ids_TK)
        if torch.is_grad_enabled() and len(x_TH):
            if self._balance:
                loss = balance_loss(p_TE, expert_ids_TK, seen.sequences)
                gates_TK = with_loss(gates_TK, loss, self._balance * self.loss_weight)
            if self._z:
                gates_TK = with_loss(gates_TK, z_loss(scores_TE), self._z * self.loss_weight)
        return Routing(expert_ids_TK, self._follow_load(gates_TK, expert_ids_TK), x_TH, scaled=True)

    def _follow_load(self, gates_TK: Tensor, expert_ids_TK: Tensor) -> Tensor:
        """The same gates; the biases, where there are any, get a gradient by the load."""
        if self.bias is None or not torch.is_grad_enabled() or not len(gates_TK):
            return gates_TK
        return with_loss(gates_TK, bias_loss(self.bias, expert_ids_TK), BIAS_WEIGHT * self.loss_weight)

    def _chosen_without_gradient(self, x_TH: Tensor, seen: Seen) -> Tensor:
        if self.kind.reads in ("token_ids", "positions"):
            assert seen.keys_T is not None, self.name
            return hashed_experts(seen.keys_T, self.num_experts, self.top_k, self.salt)
        return _top_k(self._scores(x_TH, seen), self.top_k)

    def _scores(self, x_TH: Tensor, seen: Seen) -> Tensor:
        if self.name == "avg_k":
            assert seen.means_EH is not None, self.name
            return expert_scores(x_TH, seen.means_EH)
        if self.name == "mlp":
            return mlp_scores(x_TH, self.weight, self.mix)
        if self.kind.reads == "neurons":
            assert seen.neurons is not None and seen.activation is not None, self.name
            if self.name == "vanilla":
                return neuron_scores(x_TH, seen.neurons)
            return activation_mass(x_TH, seen.neurons, seen.activation, self.num_experts)
        return expert_scores(x_TH, self.weight)

    def _positions(self, numbers_TK: Tensor, seen: Seen) -> Tensor:
        """Where the experts with these numbers are, if this kind knows experts by numbers."""
        if not self.kind.by_identity:
            return numbers_TK
        assert seen.position_E is not None, self.name
        return seen.position_E[numbers_TK]


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
