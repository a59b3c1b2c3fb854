"""Sparse feed-forward networks of others behind one interface, each with its weights in its own layout.

Shapes: T tokens, H hidden, E experts of N neurons, K experts per token, S = T * K token copies.
"""

from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peer_problem import Contender, NotHere, Problem, ones_for
from ssd_megatron.ffn.kernels import choose_backend, sparse_ffn


def ours(problem: Problem) -> Contender:
    bank = problem.bank
    backend, _ = choose_backend("auto", bank.w_in.device, bank.w_in.dtype)

    def forward(x_TH: Tensor, ids_TK: Tensor) -> Tensor:
        gates_TK = ones_for(ids_TK, x_TH).requires_grad_()
        return sparse_ffn(x_TH, ids_TK, gates_TK, bank.tensors(), bank.activation, problem.num_experts, backend)

    return Contender(forward, bank.neuron_parameters())


def dense(problem: Problem) -> Contender:
    """All neurons, two or three matrix products under autograd."""
    bank = problem.bank
    weights = bank.tensors()

    def forward(x_TH: Tensor, _ids_TK: Tensor) -> Tensor:
        return weights.hidden(F.relu(F.linear(x_TH, *weights.firing)), x_TH) @ weights.w_out

    return Contender(forward, bank.neuron_parameters(), dense=True)


def sorted_loop(problem: Problem) -> Contender:
    """What one would write first: copies sorted by expert, a product with a slice of the weights for each."""
    bank, experts = problem.bank, problem.num_experts

    def forward(x_TH: Tensor, ids_TK: Tensor) -> Tensor:
        token_S, counts_E = _sorted(ids_TK, experts)[:2]
        parts = x_TH[token_S].split(counts_E.tolist())
        outputs = []
        for expert, rows in enumerate(parts):
            e = slice(expert * problem.expert_size, (expert + 1) * problem.expert_size)
            weights = bank.tensors().each(lambda t, e=e: t[e])
            outputs.append(weights.hidden(F.relu(F.linear(rows, *weights.firing)), rows) @ weights.w_out)
        return torch.zeros_like(x_TH).index_add(0, token_S, torch.cat(outputs))

    return Contender(forward, bank.neuron_parameters())


def grouped_mm(problem: Problem) -> Contender:
    """torch.nn.functional.grouped_mm between a gather and a gather-sum, each the other's backward."""
    weights = {name: problem.by_expert(name).clone().requires_grad_() for name in problem.bank.neuron_parameters()}

    def forward(x_TH: Tensor, ids_TK: Tensor) -> Tensor:
        token_S, counts_E, copy_TK = _sorted(ids_TK, problem.num_experts)
        offsets_E = counts_E.cumsum(0, dtype=torch.int32)

        def product(rows: Tensor, name: str) -> Tensor:
            return F.grouped_mm(rows, weights[name].mT, offs=offsets_E)

        rows_SH = _Copy.apply(x_TH, token_S, copy_TK)
        hidden_SN = F.relu(product(rows_SH, "w_gate" if problem.gated else "w_in"))
        if problem.gated:
            hidden_SN = hidden_SN * product(rows_SH, "w_in")
        y_SH = F.grouped_mm(hidden_SN, weights["w_out"], offs=offsets_E)
        y_TH: Tensor = _AddUp.apply(y_SH, token_S, copy_TK)
        return y_TH

    return Contender(forward, weights)


def deepspeed_grouped_experts(problem: Problem) -> Contender:
    """DeepSpeed's AutoEP layer behind its router: the same calls in the same order, without scores."""
    if not problem.gated:
        raise NotHere("its experts are gated")
    from deepspeed.module_inject.auto_ep_layer import (
        combine_from_routed,
        permute_by_local_expert,
        unpermute_by_local_expert,
    )
    from deepspeed.moe.ep_experts import EXPERT_ACTIVATIONS, GroupedExperts, register_expert_activation

    if "reglu" not in EXPERT_ACTIVATIONS:
        register_expert_activation("reglu", lambda gate, up, _alpha, _limit: F.relu(gate) * up)
    experts = GroupedExperts(problem.hidden, problem.expert_size, problem.num_experts, activation="reglu")
    experts.to(problem.bank.w_in)
    _set(experts.w1, problem.by_expert("w_gate"))
    _set(experts.w2, problem.by_expert("w_out").mT)
    _set(experts.w3, problem.by_expert("w_in"))

    def forward(x_TH: Tensor, ids_TK: Tensor) -> Tensor:
        order_S = ids_TK.view(-1).argsort(stable=True)
        counts_E = torch.bincount(ids_TK.view(-1), minlength=problem.num_experts)
        rows, indices, aligned_E, copies = permute_by_local_expert(x_TH[order_S // problem.top_k], counts_E)
        rows = unpermute_by_local_expert(experts(rows, aligned_E), indices, copies)
        y: Tensor = combine_from_routed(
            rows,
            top_scores=ones_for(ids_TK, x_TH),
            token_indices_sorted=order_S,
            top_k=problem.top_k,
            score_apply="pre",
            combine_impl="weighted_sum",
            shape=(1, *x_TH.shape),
        )
        return y[0]

    names = {"w_gate": experts.w1, "w_in": experts.w3, "w_out": experts.w2}
    return Contender(forward, names, lambda grads: grads | {"w_out": grads["w_out"].mT})


def hugging_face(implementation: str) -> Callable[[Problem], Contender]:
    """The experts of Mixtral (gated) and Nemotron-H (not), with one of transformers' implementations."""

    def make(problem: Problem) -> Contender:
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts
        from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

        sizes = SimpleNamespace(
            _experts_implementation=implementation,
            hidden_size=problem.hidden,
            num_local_experts=problem.num_experts,  # as Mixtral's configuration calls them
            intermediate_size=problem.expert_size,
            hidden_act="relu",
            n_routed_experts=problem.num_experts,  # as Nemotron-H's does
            moe_intermediate_size=problem.expert_size,
            moe_latent_size=None,
            mlp_hidden_act="relu",
        )
        experts = (MixtralExperts if problem.gated else NemotronHExperts)(sizes).to(problem.bank.w_in)
        up = experts.gate_up_proj if problem.gated else experts.up_proj
        halves = ("w_gate", "w_in") if problem.gated else ("w_in",)
        _set(up, torch.cat([problem.by_expert(name) for name in halves], dim=1))
        _set(experts.down_proj, problem.by_expert("w_out").mT)

        def in_bank(grads: dict[str, Tensor]) -> dict[str, Tensor]:
            parts = dict(zip(halves, grads["up"].chunk(len(halves), dim=1), strict=True))
            return parts | {"w_out": grads["down"].mT}

        return Contender(
            lambda x_TH, ids_TK: experts(x_TH, ids_TK, ones_for(ids_TK, x_TH).requires_grad_()),
            {"up": up, "down": experts.down_proj},
            in_bank,
        )

    return make


def megablocks(problem: Problem) -> Contender:
    """ParallelDroplessMLP with grouped products, which its authors recommend on Hopper."""
    _need_cuda(problem)
    from megablocks.layers.arguments import Arguments
    from megablocks.layers.dmoe import ParallelDroplessMLP

    if find_spec("grouped_gemm") is None:
        raise NotHere("megablocks needs the package grouped_gemm for its grouped products")
    layer = ParallelDroplessMLP(
        Arguments(
            hidden_size=problem.hidden,
            ffn_hidden_size=problem.expert_size,
            moe_num_experts=problem.num_experts,
            moe_top_k=problem.top_k,
            moe_loss_weight=0.0,
            mlp_type="glu" if problem.gated else "mlp",
            mlp_impl="grouped",
            activation_fn=F.relu,
            bias=False,
            return_bias=False,
            fp16=False,
            bf16=True,
        )
    )
    names = {"w_gate": "w1", "w_in": "v1", "w_out": "w2"} if problem.gated else {"w_in": "w1", "w_out": "w2"}
    weights = {ours: getattr(layer.mlp, theirs) for ours, theirs in names.items()}
    for name, weight in weights.items():
        _set(weight, problem.by_expert(name).reshape(weight.shape))

    def forward(x_TH: Tensor, ids_TK: Tensor) -> Tensor:
        y_T1H: Tensor = layer(x_TH.unsqueeze(1), None, ones_for(ids_TK, x_TH).requires_grad_(), ids_TK)
        return y_T1H.squeeze(1)

    return Contender(forward, weights)


def scattermoe(problem: Problem) -> Contender:
    _need_cuda(problem)
    from scattermoe.mlp import GLUMLP, MLP

    sizes: dict[str, Any] = {
        "input_size": problem.hidden,
        "hidden_size": problem.expert_size,
        "num_experts": problem.num_experts,
        "top_k": problem.top_k,
        "activation": torch.nn.ReLU(),
    }
    layer = (GLUMLP if problem.gated else MLP)(**sizes).to(problem.bank.w_in)
    halves = ("w_in", "w_gate") if problem.gated else ("w_in",)
    _set(layer.experts.weight, torch.cat([problem.by_expert(name) for name in halves], dim=1))
    _set(layer.output_experts.weight, problem.by_expert("w_out").mT)

    def in_bank(grads: dict[str, Tensor]) -> dict[str, Tensor]:
        parts = dict(zip(halves, grads["up"].chunk(len(halves), dim=1), strict=True))
        return parts | {"w_out": grads["down"].mT}

    return Contender(
        lambda x_TH, ids_TK: layer(x_TH, ones_for(ids_TK, x_TH).requires_grad_(), ids_TK),
        {"up": layer.experts.weight, "down": layer.output_experts.weight},
        in_bank,
    )


PEERS: dict[str, Callable[[Problem], Contender]] = {
    "dense": dense,
    "ours": ours,
    "torch grouped_mm": grouped_mm,
    "sorted loop": sorted_loop,
    "DeepSpeed GroupedExperts": deepspeed_grouped_experts,
    "Hugging Face experts (loop)": hugging_face("eager"),
    "Hugging Face experts (grouped_mm)": hugging_face("grouped_mm"),
    "megablocks": megablocks,
    "scattermoe": scattermoe,
}


class _Copy(torch.autograd.Function):
    """Rows of the token of each copy; backward adds up the copies of each token."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, token_S: Tensor, copy_TK: Tensor) -> Tensor:
        ctx.save_for_backward(copy_TK)
        return x_TH.index_select(0, token_S)

    @staticmethod
    def backward(ctx: Any, d_SH: Tensor) -> tuple[Tensor, None, None]:
        return F.embedding_bag(ctx.saved_tensors[0], d_SH, mode="sum"), None, None


class _AddUp(torch.autograd.Function):
    """Sum of the copies of each token; backward copies."""

    @staticmethod
    def forward(ctx: Any, y_SH: Tensor, token_S: Tensor, copy_TK: Tensor) -> Tensor:
        ctx.save_for_backward(token_S)
        return F.embedding_bag(copy_TK, y_SH, mode="sum")

    @staticmethod
    def backward(ctx: Any, dy_TH: Tensor) -> tuple[Tensor, None, None]:
        return dy_TH.index_select(0, ctx.saved_tensors[0]), None, None


def _sorted(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of copies sorted by expert: their tokens [S], how many each expert has [E], the copies of each token [T, K]."""
    order_S = ids_TK.flatten().argsort(stable=True)
    copy_S = torch.empty_like(order_S)
    copy_S[order_S] = torch.arange(len(order_S), device=order_S.device)
    return order_S // ids_TK.shape[1], torch.bincount(ids_TK.flatten(), minlength=num_experts), copy_S.view_as(ids_TK)


@torch.no_grad()
def _set(parameter: Tensor, values: Tensor) -> None:
    parameter.copy_(values)


def _need_cuda(problem: Problem) -> None:
    if problem.bank.w_in.device.type != "cuda":
        raise NotHere("needs CUDA")
