"""What networks of benchmarks.peers are given, and what they must give back.

Shapes: T tokens, H hidden, F neurons, E experts of N neurons, K experts per token.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ssd_megatron.ffn.bank import NeuronBank
from ssd_megatron.ffn.kernels import reference


class NotHere(Exception):
    """A peer cannot do this; the message says why."""


@dataclass(frozen=True)
class Work:
    """Inputs [T, H], chosen experts [T, K] and the gradient of the output."""

    x_TH: Tensor
    ids_TK: Tensor
    dy_TH: Tensor


@dataclass(frozen=True)
class Problem:
    """One network's weights."""

    bank: NeuronBank
    num_experts: int
    top_k: int

    @classmethod
    def random(
        cls,
        hidden: int,
        neurons: int,
        num_experts: int,
        top_k: int,
        activation: str,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "Problem":
        torch.manual_seed(0)
        bank = NeuronBank(hidden, neurons, activation, False, dtype=dtype, device=device)
        with torch.no_grad():
            for weight in bank.neuron_parameters().values():
                weight.normal_(std=hidden**-0.5)
        return cls(bank, num_experts, top_k)

    @property
    def hidden(self) -> int:
        return self.bank.w_in.shape[1]

    @property
    def expert_size(self) -> int:
        return len(self.bank.w_in) // self.num_experts

    @property
    def gated(self) -> bool:
        return self.bank.activation.gated

    def by_expert(self, name: str) -> Tensor:
        """Weights `w_in`, `w_gate` or `w_out`, [E, N, H]."""
        weight: Tensor = getattr(self.bank, name).detach()
        return weight.view(self.num_experts, -1, self.hidden)

    def work(self, tokens: int, seed: int) -> Work:
        """Random tokens; each expert is as likely as any other."""
        like, generator = self.bank.w_in, torch.Generator().manual_seed(seed)
        x_TH, dy_TH = (torch.randn(tokens, self.hidden, generator=generator).to(like) for _ in range(2))
        scores_TE = torch.rand(tokens, self.num_experts, generator=generator).to(like.device)
        return Work(x_TH.requires_grad_(), scores_TE.topk(self.top_k, dim=1).indices, dy_TH)

    def brute_force(self, work: Work, *, dense: bool) -> dict[str, Tensor]:
        """Output and gradients in fp32, by the bank's names."""
        x_TH = work.x_TH.detach().float().requires_grad_()
        weights = self.bank.tensors().each(lambda t: t.detach().float().requires_grad_())
        everything_TE = torch.arange(self.num_experts, device=x_TH.device).expand(len(x_TH), -1)
        ids = everything_TE if dense else work.ids_TK
        y_TH = reference.sparse_ffn(x_TH, ids, None, weights, self.bank.activation, self.num_experts, False)
        y_TH.backward(work.dy_TH.float())
        present = {name: t for name, t in weights._asdict().items() if t is not None}
        return _gradients(y_TH, x_TH, present)


@dataclass
class Contender:
    """A network that runs.

    Attributes:
        forward: x [T, H] and ids [T, K] to y [T, H].
        weights: its parameters by the names of the bank's tensors, or by its own.
        in_bank: its gradients by name, brought to the names and order of the bank's.
        dense: computes all neurons.
    """

    forward: Callable[[Tensor, Tensor], Tensor]
    weights: Mapping[str, Tensor]
    in_bank: Callable[[dict[str, Tensor]], dict[str, Tensor]] = field(default=lambda gradients: gradients)
    dense: bool = False

    def forward_and_backward(self, work: Work) -> Tensor:
        work.x_TH.grad = None
        for weight in self.weights.values():
            weight.grad = None
        y_TH = self.forward(work.x_TH, work.ids_TK)
        y_TH.backward(work.dy_TH)
        return y_TH

    def results(self, work: Work) -> dict[str, Tensor]:
        """Output and gradients by the bank's names, [F, H] for weights."""
        y_TH = self.forward_and_backward(work)
        raw = _gradients(y_TH, work.x_TH, self.weights)
        outer = {name: raw.pop(name) for name in ("y", "x")}
        return outer | {name: grad.reshape(-1, grad.shape[-1]) for name, grad in self.in_bank(raw).items()}


def _gradients(y_TH: Tensor, x_TH: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {"y": y_TH.detach()}
    for name, tensor in {"x": x_TH, **weights}.items():
        assert tensor.grad is not None, name
        found[name] = tensor.grad.detach().clone()
    return found


def ones_for(ids_TK: Tensor, like: Tensor) -> Tensor:
    """Router scores that change nothing."""
    return torch.ones(ids_TK.shape, dtype=like.dtype, device=like.device)
