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
from ssd_megatron.ffn.kernels import BACKENDS, sparse_ffn, tiles_pay
from ssd_megatron.ffn.kernels.torch_tiles import tiled_ffn
from ssd_megatron.ffn.routers import Choice, Router, Seen
from ssd_megatron.ffn.tiles import cut, join, of_tokens, tile_inputs

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
    routing_granularity: int = 1
    router: str = "centroid"
    load_balance: float = 0.0
    z_loss: float = 0.0
    balance_bias: bool = False
    hash_salt: int = 0  # no field of ds.json: the layer's number


class SwitchableFFN(nn.Module):
    """A feed-forward network with one set of parameters and two modes; megatron-core's `mlp` submodule.

    Attributes:
        bank: the parameters, read by both modes.
        router: read in sparse mode only.
        mode: set from outside; a switch to sparse needs neurons grouped by expert and router rows set beforehand.
        observer: called in dense mode with the inputs [T, H] and the pre-activations that decide firing, [T, neurons of
            this tensor-parallel rank], both detached. The second is overwritten afterwards: an observer copies what it
            keeps.
        chosen: called in training forward passes of sparse mode with the experts that the router chose [T, K] (of tiles
            [M, K]); the network computes those that it returns.
        token_ids: of the tokens of the next forward, [batch, sequence] int64; set by the block for routers that hash.
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
        self.router = Router(
            s.hidden_size,
            s.num_experts,
            s.top_k,
            s.router_update,
            kind=s.router,
            balance=s.load_balance,
            z=s.z_loss,
            balance_bias=s.balance_bias,
            salt=s.hash_salt,
            backend=s.backend,
            dtype=dtype,
        )
        self.mode: Mode = "dense"
        self.observer: Callable[[Tensor, Tensor], None] | None = None
        self.chosen: Choice | None = None
        self.token_ids: Tensor | None = None
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
        y = self._dense(x.reshape(-1, x.shape[-1])) if self.mode == "dense" else self._sparse(x)
        return y.view(x.shape), self.bank.b_out

    def _dense(self, x_TH: Tensor) -> Tensor:
        x_TH = self.homes.enter(x_TH)
        with self.homes.gathered(self.bank.tensors()) as tensors:
            pre_TF = F.linear(x_TH, *tensors.firing)
            if self.observer is not None:
                self.observer(x_TH.detach(), pre_TF.detach())
            y_TH = tensors.hidden(self.bank.activation.act(pre_TF), x_TH) @ tensors.w_out
        return self.homes.leave(y_TH)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # its sizes depend on the data
    def _sparse(self, x_sbH: Tensor) -> Tensor:
        num_experts, tile, homes = self.settings.num_experts, self.settings.routing_granularity, self.homes
        length, batch, width = x_sbH.shape
        x_TH, chosen = x_sbH.reshape(-1, width), self.chosen if torch.is_grad_enabled() else None
        routed = x_TH if tile == 1 else tile_inputs(x_sbH, tile)
        seen = self._seen(length, batch, x_sbH.device)
        expert_ids, gates, routed, scaled = self.router.route(routed, seen, chosen)
        expert_ids_TK = expert_ids if tile == 1 else of_tokens(expert_ids, length, batch, tile)
        ids = expert_ids_TK.flatten()
        self.expert_load = ids.new_zeros(num_experts).scatter_add_(0, ids, torch.ones_like(ids))
        # A tensor-parallel rank has the gradients of its own experts' gates only; the router, which all have alike,
        # gets their sum.
        gates = None if gates is None else homes.enter(gates)
        if self._computes_tiles(x_sbH):
            args = (expert_ids, gates, self.bank.tensors(), self.bank.activation, num_experts, scaled)
            return join(tiled_ffn(cut(x_sbH, tile), *args), length, batch)
        gates_TK = gates if gates is None or tile == 1 else of_tokens(gates, length, batch, tile)
        x_TH = homes.enter(routed if tile == 1 else x_TH)
        if not homes.tokens_travel:
            y_TH = self._compute(x_TH, homes.local_ids(expert_ids_TK, num_experts), gates_TK, scaled)
        else:
            route, ids_RK = homes.route(expert_ids_TK, num_experts)
            y_RH = self._compute(route.send(x_TH), ids_RK, route.send_gates(gates_TK, scaled), scaled)
            y_TH = route.collect(y_RH)
        return homes.leave(y_TH)

    def _computes_tiles(self, x_sbH: Tensor) -> bool:
        """Whether a tile is computed as one piece: all its experts are here, it is whole, and that is faster."""
        s = self.settings
        tile, whole = s.routing_granularity, len(x_sbH) % s.routing_granularity == 0
        pays = tiles_pay(s.backend, tile, s.ffn_hidden_size // s.num_experts, x_sbH.device, x_sbH.dtype)
        return tile > 1 and whole and self.homes.count == 1 and pays

    def _compute(self, x_TH: Tensor, local_ids_TK: Tensor, gates_TK: Tensor | None, scaled: bool) -> Tensor:
        """What this home's experts give."""
        num_experts = self.settings.num_experts // self.homes.count
        tensors, activation = self.bank.tensors(), self.bank.activation
        return sparse_ffn(x_TH, local_ids_TK, gates_TK, tensors, activation, num_experts, self.settings.backend, scaled)

    def _seen(self, length: int, batch: int, device: torch.device) -> Seen:
        """What the router looks at beside the inputs of `batch` sequences."""
        kind, bank, homes, num_experts = self.router.kind, self.bank, self.homes, self.settings.num_experts
        means_EH = neurons = keys_sb = position_E = None
        if kind.reads == "means":
            means_EH = homes.all_rows(bank.expert_means(num_experts // homes.count))
        elif kind.reads == "neurons":
            neurons = bank.tensors().each(lambda shard: homes.all_rows(shard.detach()))
        elif kind.reads == "token_ids":
            assert self.token_ids is not None, "the block sets the token ids"
            keys_sb = self.token_ids.t()
        elif kind.reads == "positions":
            keys_sb = torch.arange(length, device=device).unsqueeze(1).expand(length, batch)
        if kind.by_identity:
            position_E = bank.expert_numbers(num_experts).argsort()
        keys_T = None if keys_sb is None else keys_sb.reshape(-1)
        return Seen(means_EH, neurons, bank.activation, keys_T, position_E, max(1, batch))
