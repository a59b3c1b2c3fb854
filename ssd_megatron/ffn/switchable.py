"""The feed-forward network that runs dense or sparse on one neuron bank.

Shapes: T tokens (sequence x batch), H hidden, F neurons, E experts, K experts per token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssd_megatron.ffn.bank import NeuronBank
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
        observer: called in dense mode with the inputs [T, H] and the pre-activations [T, F] that decide firing, both
            detached. The second is overwritten afterwards: an observer copies what it keeps.
        expert_load: int64 [E], tokens that each expert got in the last sparse forward.
    """

    def __init__(self, config: "TransformerConfig", settings: FFNSettings) -> None:
        super().__init__()
        s = settings
        assert s.backend in BACKENDS, f"backend {s.backend!r} is not resolved: use choose_backend"
        assert s.ffn_hidden_size % s.num_experts == 0, (s.ffn_hidden_size, s.num_experts)
        dtype = config.params_dtype
        self.settings = settings
        self.bank = NeuronBank(s.hidden_size, s.ffn_hidden_size, s.activation, s.add_bias, dtype=dtype)
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
        tensors = self.bank.tensors()
        pre_TF = F.linear(x_TH, *tensors.firing)
        if self.observer is not None:
            self.observer(x_TH.detach(), pre_TF.detach())
        return tensors.hidden(self.bank.activation.act(pre_TF), x_TH) @ tensors.w_out

    def _sparse(self, x_TH: Tensor) -> Tensor:
        num_experts = self.settings.num_experts
        expert_ids_TK, gates_TK = self.router.route(x_TH, self.bank.rows())
        self.expert_load = torch.bincount(expert_ids_TK.flatten(), minlength=num_experts)
        return sparse_ffn(
            x_TH,
            expert_ids_TK,
            gates_TK,
            self.bank.tensors(),
            self.bank.activation,
            num_experts,
            self.settings.backend,
        )
