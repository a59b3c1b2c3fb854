"""Kinds of routers: what each one looks at, what it learns, and how it scores experts.

Shapes: T tokens (or tiles), H hidden, F neurons, E experts of N neurons, K experts per token, Q = sqrt(E).

One network with experts of any size and one of these routers is any of the sparse feed-forward networks that Liu et al.
compare (A Unified View of Sparse Feed-Forward Network, arXiv 2305.13999).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_megatron.errors import ConfigError
from ssd_megatron.ffn.activations import Activation
from ssd_megatron.ffn.bank import NeuronTensors

Reads = Literal["inputs", "means", "neurons", "token_ids", "positions"]
Shapes = Callable[[int, int], dict[str, tuple[int, ...]]]


def _no_parameters(_hidden: int, _experts: int) -> dict[str, tuple[int, ...]]:
    return {}


@dataclass(frozen=True)
class RouterKind:
    """What one kind of router is.

    Attributes:
        reads: what it looks at beside its own parameters: the tokens' inputs only, or also the current mean row of each
            expert or all neurons; or not the inputs but the tokens' ids or positions.
        shapes: parameters by name, given H and E.
        scales: outputs are multiplied by its gates.
        by_identity: it knows experts not by their position, which placement changes, but by a number that is the same
            on every layout (`bank.expert_numbers`).
    """

    reads: Reads = "inputs"
    shapes: Shapes = _no_parameters
    scales: bool = False
    by_identity: bool = False


def _row_per_expert(hidden: int, experts: int) -> dict[str, tuple[int, ...]]:
    return {"weight": (experts, hidden)}


def _product_keys(hidden: int, experts: int) -> dict[str, tuple[int, ...]]:
    side = math.isqrt(experts)
    if side**2 != experts:
        raise ConfigError(f"num_experts ({experts}) must be a square with kind pkm: try {side**2} or {(side + 1) ** 2}")
    return {"weight": (2 * side, hidden)}


def _two_layers(hidden: int, experts: int) -> dict[str, tuple[int, ...]]:
    return {"weight": (experts, hidden), "mix": (experts, experts)}


KINDS = {
    # Mean normalised row of the expert's neurons at the switch (SSD, arXiv 2410.03440).
    "centroid": RouterKind(shapes=_row_per_expert),
    # Mean row of the expert's neurons as they are (Avg-K, arXiv 2305.13999).
    "avg_k": RouterKind("means"),
    # Softmax that scales the outputs (Switch Transformer, arXiv 2101.03961).
    "switch": RouterKind(shapes=_row_per_expert, scales=True),
    # Sums of two half-keys (Product Key Memory, arXiv 1907.05242).
    "pkm": RouterKind(shapes=_product_keys, by_identity=True),
    # Linear, tanh, Linear on normalised inputs (MoEfication, arXiv 2110.01786).
    "mlp": RouterKind(shapes=_two_layers, by_identity=True),
    # Fixed experts, or neurons, of each token id (Hash Layers, arXiv 2106.04426; RandHash, arXiv 2305.13999).
    "hash": RouterKind("token_ids", by_identity=True),
    "rand_hash": RouterKind("token_ids", by_identity=True),
    # Fixed experts of each position: a control, which knows nothing of the token.
    "random": RouterKind("positions", by_identity=True),
    # Single neurons by all their pre-activations (VanillaM, arXiv 2305.13999).
    "vanilla": RouterKind("neurons"),
    # What the experts' neurons really give: a ceiling, at the price of the whole network (MoEfication).
    "oracle": RouterKind("neurons"),
}


def expert_scores(x_TH: Tensor, weight_EH: Tensor) -> Tensor:
    """x @ weight^T, [T, E], in at least fp32: bf16 scores would tie often, and ties would choose the experts."""
    dtype = torch.promote_types(x_TH.dtype, torch.float32)
    return F.linear(x_TH.to(dtype), weight_EH.to(dtype))


def product_scores(x_TH: Tensor, weight_2QH: Tensor) -> Tensor:
    """Expert Q a + b scores as much as half-key a of the first half and b of the second, [T, E]."""
    first_TQ, second_TQ = expert_scores(x_TH, weight_2QH).chunk(2, dim=1)
    return (first_TQ.unsqueeze(2) + second_TQ.unsqueeze(1)).flatten(1)


def half_keys(weight_EH: Tensor) -> Tensor:
    """Half-keys [2 Q, H] whose sums are nearest to the rows, in the sense of least squares."""
    side = math.isqrt(len(weight_EH))
    grid_QQH = weight_EH.view(side, side, -1)
    half_mean_H = grid_QQH.mean(dim=(0, 1)) / 2
    return torch.cat([grid_QQH.mean(dim=1) - half_mean_H, grid_QQH.mean(dim=0) - half_mean_H])


def mlp_scores(x_TH: Tensor, weight_EH: Tensor, mix_EE: Tensor) -> Tensor:
    """tanh of the normalised input's scores, mixed, [T, E]."""
    return expert_scores(expert_scores(F.normalize(x_TH.float(), dim=1), weight_EH).tanh(), mix_EE)


def neuron_scores(x_TH: Tensor, bank: NeuronTensors) -> Tensor:
    """Pre-activations that decide whether a neuron fires, [T, F]."""
    weight_FH, bias_F = bank.firing
    scores_TF = expert_scores(x_TH, weight_FH)
    return scores_TF if bias_F is None else scores_TF + bias_F


def activation_mass(x_TH: Tensor, bank: NeuronTensors, activation: Activation, num_experts: int) -> Tensor:
    """Sum over each expert's neurons of the size of their outputs, [T, E]; for ReLU, of the activations."""
    hidden_TF = bank.hidden(activation.act(F.linear(x_TH, *bank.firing)), x_TH)
    by_expert = hidden_TF.abs().view(len(x_TH), num_experts, hidden_TF.shape[1] // num_experts)
    return by_expert.sum(dim=2, dtype=torch.float32)


def hashed_experts(keys_T: Tensor, num_experts: int, top_k: int, salt: int) -> Tensor:
    """Distinct experts of each key, [T, K] int64, drawn as if at random; the first k are those for k < K.

    Args:
        keys_T: int64, token ids or positions.
        salt: other salts draw others.
    """
    experts_E = torch.arange(num_experts, device=keys_T.device)
    scores_TE = _mix(_mix(keys_T + salt * 1_000_003).unsqueeze(1) + experts_E)
    return scores_TE.topk(top_k, dim=1).indices


def _mix(x: Tensor) -> Tensor:
    """A bijection of 64 bits that looks random (Steele et al., SplitMix, OOPSLA 2014); products wrap around."""
    x = x + (0x9E3779B97F4A7C15 - 2**64)
    x = (x ^ _shifted(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _shifted(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shifted to the right, zeros coming in."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
