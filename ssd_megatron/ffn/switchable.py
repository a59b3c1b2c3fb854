"""The feed-forward network that runs dense or sparse on one neuron bank.

Shapes: T tokens (sequence x batch), H hidden, F neurons, E experts, K experts per token; F and E of the whole network
unless said otherwise (homes.py says who holds which).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssd_megatron.ffn.bank import NeuronBank
from ssd_megatron.ffn.homes import Homes
from ssd_megatron.ffn.kernels import BACKENDS, sparse_ffn
from ssd_megatron.ffn.routers import Router

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

Mode = Literal["dense", "sparse"]


@dataclass(frozen=True)
class FFNSettings:
    """What one feed-forward network is made of; fields as in ds.json, `backend` as `choose_backend` resolved it."""

    hidden_size: int
    ffn_hidden_size: int
    activation: str
    add_bias: bool
    num_experts: int
    top_k: int
    router_update: str
    backend: str


class SwitchableFFN(nn.Module):
    """A feed-forward network with one set of parameters and two modes; megatron-core's `mlp` submodule.

    Attributes:
        bank: the parameters, read by both modes.
        router: read in sparse mode only.
        mode: set from outside; a switch to sparse needs neurons grouped by expert and router rows set beforehand.
        observer: called in dense mode with the inputs [T, H] and the pre-activations that decide firing, [T, neurons of
            this tensor-parallel rank], both detached. The second is overwritten afterwards: an observer copies what it
            keeps.
        expert_load: int64 [E], tokens of this rank that each expert got in the last sparse forward.

    Args:
        homes: where the neurons are; a single home without it.
    """

    def __init__(self, config: "TransformerConfig", settings: FFNSettings, homes: Homes | None = None) -> None:
        super().__init__()
        s = settings
        self.homes = homes or Homes()
        assert s.backend in BACKENDS, f"backend {s.backend!r} is not resolved: use choose_backend"
        assert s.ffn_hidden_size % s.num_experts == 0, (s.ffn_hidden_size, s.num_experts)
        dtype = config.params_dtype
        self.settings = settings
        self.bank = NeuronBank(
            s.hidden_size,
            s.ffn_hidden_size,
            s.activation,
            s.add_bias,
            home=self.homes.index,
            homes=self.homes.count,
            dtype=dtype,
        )
        self.router = Router(s.hidden_size, s.num_experts, s.top_k, s.router_update, dtype=dtype)
        self.mode: Mode = "dense"
        self.observer: Callable[[Tensor, Tensor], None] | None = None
        self.expert_load = torch.zeros(s.num_experts, dtype=torch.int64)

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The network's output without its last bias, and that bias, which megatron-core adds later.

        Args:
            x: [sequence, batch, H].
            padding_mask: part of megatron-core's call; a feed-forward network has no use for it.
        Returns:
            y of x's shape, and b_out [H] or None.
        """
        assert self.mode in ("dense", "sparse"), self.mode
        x_TH = x.reshape(-1, x.shape[-1])
        y_TH = self._dense(x_TH) if self.mode == "dense" else self._sparse(x_TH)
        return y_TH.view(x.shape), self.bank.b_out

    def _dense(self, x_TH: Tensor) -> Tensor:
        x_TH = self.homes.enter(x_TH)
        with self.homes.gathered(self.bank.tensors()) as tensors:
            pre_TF = F.linear(x_TH, *tensors.firing)
            if self.observer is not None:
                self.observer(x_TH.detach(), pre_TF.detach())
            y_TH = tensors.hidden(self.bank.activation.act(pre_TF), x_TH) @ tensors.w_out
        return self.homes.leave(y_TH)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # its sizes depend on the data
    def _sparse(self, x_TH: Tensor) -> Tensor:
        num_experts, homes = self.settings.num_experts, self.homes
        expert_ids_TK, gates_TK = self.router.route(x_TH, self._expert_means())
        ids = expert_ids_TK.flatten()
        self.expert_load = ids.new_zeros(num_experts).scatter_add_(0, ids, torch.ones_like(ids))
        # A tensor-parallel rank has the gradients of its own experts' gates only; the router, which all have alike,
        # gets their sum.
        gates_TK = None if gates_TK is None else homes.enter(gates_TK)
        x_TH = homes.enter(x_TH)
        if not homes.tokens_travel:
            y_TH = self._compute(x_TH, homes.local_ids(expert_ids_TK, num_experts), gates_TK)
        else:
            route, ids_RK = homes.route(expert_ids_TK, num_experts)
            y_RH = self._compute(route.send(x_TH), ids_RK, route.send_gates(gates_TK))
            y_TH = route.collect(y_RH)
        return homes.leave(y_TH)

    def _compute(self, x_TH: Tensor, local_ids_TK: Tensor, gates_TK: Tensor | None) -> Tensor:
        """What this home's experts give."""
        num_experts = self.settings.num_experts // self.homes.count
        tensors, activation = self.bank.tensors(), self.bank.activation
        return sparse_ffn(x_TH, local_ids_TK, gates_TK, tensors, activation, num_experts, self.settings.backend)

    def _expert_means(self) -> Tensor | None:
        if not self.router.reads_bank:
            return None
        return self.homes.all_rows(self.bank.expert_means(self.settings.num_experts // self.homes.count))
