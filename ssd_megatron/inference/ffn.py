"""The feed-forward network of a trained model, dense or sparse as each call's number of tokens asks for.

Shapes: T tokens, H hidden.
"""

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ssd_megatron.ffn.bank import NeuronBank
from ssd_megatron.ffn.kernels import sparse_ffn
from ssd_megatron.ffn.kernels.decode import MOST_TOKENS, few_tokens_ffn
from ssd_megatron.ffn.router_kinds import RouterKind
from ssd_megatron.ffn.routers import Router, Seen
from ssd_megatron.inference.place import Place

Mode = Literal["dense", "sparse", "auto"]
MODES: tuple[Mode, ...] = ("dense", "sparse", "auto")

# From how many tokens on `auto` is sparse again: in between, nearly every expert has some token and few of them have
# many (docs/log.md, 2026-11-27; not measured on GPUs).
SPARSE_FROM = {"cpu": 256, "cuda": 1024}


@dataclass(frozen=True)
class Experts:
    """How the neurons of a network are grouped, who chooses among the groups (fields as in ds.json, section `ssd`), and
    the kernels that compute them and the choice."""

    count: int
    router: str
    router_update: str
    balance_bias: bool
    backend: str
    router_backend: str = "torch"


class FeedForward(nn.Module):
    """One bank, read dense or sparse; with `experts` None only dense.

    Attributes:
        mode: dense, sparse, or auto: sparse where that is faster, with one or two tokens and with many.
        top_k: experts per token in sparse mode.

    Args:
        layer: number of the layer; hashes of different layers differ.
        place: each rank has some of the neurons.
    """

    def __init__(
        self,
        hidden_size: int,
        num_neurons: int,
        activation: str,
        add_bias: bool,
        experts: Experts | None,
        layer: int,
        place: Place,
    ) -> None:
        super().__init__()
        dtype, device = place.dtype, place.device
        self.bank = NeuronBank(
            hidden_size,
            num_neurons,
            activation,
            add_bias,
            home=place.rank,
            homes=place.ranks,
            dtype=dtype,
            device=device,
        )
        self.place = place
        self.experts = experts
        self.router = None
        if experts is not None:
            self.router = Router(
                hidden_size,
                experts.count,
                experts.count,
                experts.router_update,
                kind=experts.router,
                balance_bias=experts.balance_bias,
                salt=layer,
                backend=experts.router_backend,
                dtype=dtype,
                device=device,
            )
        self.mode: Mode = "dense"
        self._known: Seen | None = None

    @property
    def top_k(self) -> int:
        return 0 if self.router is None else self.router.top_k

    @top_k.setter
    def top_k(self, number: int) -> None:
        assert self.router is not None and 1 <= number <= self.router.num_experts, number
        self.router.top_k = number

    def forward(self, x_TH: Tensor, keys_T: Tensor | None = None) -> Tensor:
        """The network's output with its last bias.

        Args:
            keys_T: int64, ids or positions of the tokens, for a router that goes by them.
        """
        y_TH = self._sparse(x_TH, keys_T) if self._is_sparse(len(x_TH)) else self._dense(x_TH)
        y_TH = self.place.sum("feed-forward network", y_TH)
        return y_TH if self.bank.b_out is None else y_TH + self.bank.b_out

    def launches_alike(self, tokens: int) -> bool:
        """Whether what is launched on a GPU for so many tokens depends on their number alone: in sparse mode of backend
        triton only, as the others ask the device how many tokens an expert has."""
        return not self._is_sparse(tokens) or (self.experts is not None and self.experts.backend == "triton")

    def _is_sparse(self, tokens: int) -> bool:
        if self.mode != "auto":
            return self.mode == "sparse"
        few_or_many = tokens <= MOST_TOKENS or tokens >= SPARSE_FROM[self.place.device.type]
        return few_or_many and self.router is not None

    def _dense(self, x_TH: Tensor) -> Tensor:
        tensors, activation = self.bank.tensors(), self.bank.activation
        if len(x_TH) <= MOST_TOKENS and x_TH.device.type == "cpu":
            return few_tokens_ffn(x_TH, None, tensors, activation, 1)
        return tensors.hidden(activation.act(F.linear(x_TH, *tensors.firing)), x_TH) @ tensors.w_out

    def _sparse(self, x_TH: Tensor, keys_T: Tensor | None) -> Tensor:
        assert self.router is not None and self.experts is not None
        router, seen = self.router, self._seen(self.router.kind, self.experts.count, keys_T)
        tensors, activation, count = self.bank.tensors(), self.bank.activation, self.place.part(self.experts.count)
        few, on_cpu = len(x_TH) <= MOST_TOKENS and not router.kind.scales, x_TH.device.type == "cpu"
        if few and not on_cpu and self.experts.backend == "triton":
            from ssd_megatron.ffn.kernels import triton_decode  # the package triton need not be there

            rows_EH = router.scoring_rows(seen)
            if rows_EH is None:
                ids_TK = router.route(x_TH, seen).expert_ids_TK
            else:
                ids_TK = triton_decode.best_experts(x_TH, rows_EH, router.bias, router.top_k)
            return triton_decode.few_tokens_ffn(x_TH, self.place.own(ids_TK, count), tensors, activation, count)
        ids_TK, gates_TK, _, scaled = router.route(x_TH, seen)
        ids_TK = self.place.own(ids_TK, count)
        if few and on_cpu:
            return few_tokens_ffn(x_TH, ids_TK, tensors, activation, count)
        gates_TK = gates_TK if scaled else None
        return sparse_ffn(x_TH, ids_TK, gates_TK, tensors, activation, count, self.experts.backend, scaled)

    def _seen(self, kind: RouterKind, count: int, keys_T: Tensor | None) -> Seen:
        """What the router looks at beside the inputs. The weights do not change: what follows from them is kept."""
        if self._known is None:
            bank, place, means_EH, neurons = self.bank, self.place, None, None
            if kind.reads == "means":
                means_EH = place.all_rows("means of experts", bank.expert_means(place.part(count)))
            if kind.reads == "neurons":
                neurons = bank.tensors().each(lambda shard: place.all_rows("neurons", shard))
            position_E = bank.expert_numbers(count).argsort() if kind.by_identity else None
            self._known = Seen(means_EH, neurons, bank.activation, None, position_E)
        return self._known._replace(keys_T=keys_T)
