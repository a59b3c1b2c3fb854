"""The feed-forward network of a trained model, dense or sparse as each call's number of tokens asks for.

Shapes: T tokens, H hidden.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssd_megatron.ffn.bank import NeuronBank
from ssd_megatron.ffn.kernels import sparse_ffn
from ssd_megatron.ffn.kernels.decode import MOST_TOKENS, few_tokens_ffn
from ssd_megatron.ffn.routers import Router, Seen

Mode = Literal["dense", "sparse", "auto"]
MODES: tuple[Mode, ...] = ("dense", "sparse", "auto")

# From how many tokens on `auto` is sparse again: in between, nearly every expert has some token and few of them have
# many (docs/log.md, 2026-11-27; not measured on GPUs).
SPARSE_FROM = {"cpu": 256, "cuda": 1024}


@dataclass(frozen=True)
class Experts:
    """How the neurons of a network are grouped, and the kernels that compute the groups."""

    count: int
    router_update: str
    backend: str


class FeedForward(nn.Module):
    """One bank, read dense or sparse; with `experts` None only dense.

    Attributes:
        mode: dense, sparse, or auto: sparse where that is faster, with one or two tokens and with many.
        top_k: experts per token in sparse mode.
    """

    def __init__(
        self,
        hidden_size: int,
        num_neurons: int,
        activation: str,
        add_bias: bool,
        experts: Experts | None,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.bank = NeuronBank(hidden_size, num_neurons, activation, add_bias, dtype=dtype, device=device)
        self.experts = experts
        self.router = None
        if experts is not None:
            count, update = experts.count, experts.router_update
            self.router = Router(hidden_size, count, count, update, dtype=dtype, device=device)
        self.mode: Mode = "dense"
        self._means_EH: Tensor | None = None

    @property
    def top_k(self) -> int:
        return 0 if self.router is None else self.router.top_k

    @top_k.setter
    def top_k(self, number: int) -> None:
        assert self.router is not None and 1 <= number <= self.router.num_experts, number
        self.router.top_k = number

    def forward(self, x_TH: Tensor) -> Tensor:
        """The network's output with its last bias."""
        y_TH = self._sparse(x_TH) if self._is_sparse(x_TH) else self._dense(x_TH)
        return y_TH if self.bank.b_out is None else y_TH + self.bank.b_out

    def _is_sparse(self, x_TH: Tensor) -> bool:
        if self.mode != "auto":
            return self.mode == "sparse"
        few_or_many = len(x_TH) <= MOST_TOKENS or len(x_TH) >= SPARSE_FROM[x_TH.device.type]
        return few_or_many and self.router is not None

    def _dense(self, x_TH: Tensor) -> Tensor:
        tensors, activation = self.bank.tensors(), self.bank.activation
        if len(x_TH) <= MOST_TOKENS and x_TH.device.type == "cpu":
            return few_tokens_ffn(x_TH, None, tensors, activation, 1)
        return tensors.hidden(activation.act(F.linear(x_TH, *tensors.firing)), x_TH) @ tensors.w_out

    def _sparse(self, x_TH: Tensor) -> Tensor:
        assert self.router is not None and self.experts is not None
        if self.router.kind.reads == "means" and self._means_EH is None:
            self._means_EH = self.bank.expert_means(self.experts.count)
        ids_TK = self.router.route(x_TH, Seen(means_EH=self._means_EH)).expert_ids_TK
        tensors, activation, count = self.bank.tensors(), self.bank.activation, self.experts.count
        if len(x_TH) <= MOST_TOKENS and x_TH.device.type == "cpu":
            return few_tokens_ffn(x_TH, ids_TK, tensors, activation, count)
        if len(x_TH) <= MOST_TOKENS and self.experts.backend == "triton":
            from ssd_megatron.ffn.kernels import triton_decode  # where it is used: the package triton need not be there

            return triton_decode.few_tokens_ffn(x_TH, ids_TK, tensors, activation, count)
        return sparse_ffn(x_TH, ids_TK, None, tensors, activation, count, self.experts.backend)
