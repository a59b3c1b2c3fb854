"""The neuron bank: the parameters of one feed-forward network, one row per neuron.

Shapes: T tokens, H hidden, F neurons of the network, of which this rank holds F / homes.

Everything of a neuron lies in the same row of every tensor, so expert e of E is the slice
[e * F/E, (e + 1) * F/E) of all of them, and dense and sparse mode read the very same memory.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssd_megatron.ffn.activations import ACTIVATIONS
from ssd_megatron.parallel.sharding import shard_rows


class NeuronTensors(NamedTuple):
    """The tensors of a bank that have one row per neuron. A switch permutes exactly these.

    Attributes:
        w_in: input weights [F, H].
        w_gate: the gate's input weights [F, H]; None when the activation is not gated.
        b_in: input bias [F]; None without biases.
        b_gate: the gate's bias [F]; None without biases or gate.
        w_out: output weights [F, H], the transpose of a usual second linear layer.
    """

    w_in: Tensor
    w_gate: Tensor | None
    b_in: Tensor | None
    b_gate: Tensor | None
    w_out: Tensor

    @property
    def firing(self) -> tuple[Tensor, Tensor | None]:
        """Weights and bias that decide whether a neuron fires: the gate's, or w_in and b_in without a gate."""
        return (self.w_in, self.b_in) if self.w_gate is None else (self.w_gate, self.b_gate)

    def each(self, change: Callable[[Tensor], Tensor]) -> "NeuronTensors":
        """The same tensors, each changed; absent ones stay absent."""
        w_gate, b_in, b_gate = (None if t is None else change(t) for t in (self.w_gate, self.b_in, self.b_gate))
        return NeuronTensors(change(self.w_in), w_gate, b_in, b_gate, change(self.w_out))

    def hidden(self, fired_TF: Tensor, x_TH: Tensor) -> Tensor:
        """Outputs of the neurons [T, F] from those of the activation: times the other half where there is a gate."""
        return fired_TF if self.w_gate is None else fired_TF * F.linear(x_TH, self.w_in, self.b_in)


NEURON_TENSORS = NeuronTensors._fields


class NeuronBank(nn.Module):
    """This home's parameters of one feed-forward network, and the identity of the neuron at each position of all homes.

    y = sum over neurons of act(x . w_gate + b_gate) * (x . w_in + b_in) * w_out + b_out for gated activations, and
    act(x . w_in + b_in) * w_out + b_out for the others. Values are left uninitialised.

    Args:
        hidden_size: H.
        num_neurons: F, of all homes together.
        activation: a name in ACTIVATIONS.
        add_bias: whether b_in, b_gate (gated only) and b_out exist.
        home, homes: this rank holds the home-th of `homes` equal parts of the neurons.
    """

    neuron_ids: Tensor  # [F] int64, saved with the state: which neuron lies at each position, arange at the start

    def __init__(
        self,
        hidden_size: int,
        num_neurons: int,
        activation: str,
        add_bias: bool,
        *,
        home: int = 0,
        homes: int = 1,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        assert num_neurons % homes == 0, (num_neurons, homes)
        self.activation = ACTIVATIONS[activation]

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device))

        gated, rows = self.activation.gated, num_neurons // homes
        self.w_in = parameter(rows, hidden_size)
        self.w_gate = parameter(rows, hidden_size) if gated else None
        self.b_in = parameter(rows) if add_bias else None
        self.b_gate = parameter(rows) if add_bias and gated else None
        self.w_out = parameter(rows, hidden_size)
        self.b_out = parameter(hidden_size) if add_bias else None
        for neuron_parameter in self.neuron_parameters().values():
            shard_rows(neuron_parameter, home, homes)
        self.register_buffer("neuron_ids", torch.arange(num_neurons, device=device))

    def tensors(self) -> NeuronTensors:
        """The per-neuron tensors, as the kernels take them."""
        return NeuronTensors(self.w_in, self.w_gate, self.b_in, self.b_gate, self.w_out)

    def neuron_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters with one row per neuron by name, in the order of NEURON_TENSORS, absent ones left out."""
        parameters = dict(self.named_parameters())
        return {name: parameters[name] for name in NEURON_TENSORS if name in parameters}

    def rows(self) -> Tensor:
        """This home's rows [F / homes, H] that decide firing and so the clustering: the gate's, or w_in without one."""
        return self.tensors().firing[0]

    def expert_numbers(self, num_experts: int) -> Tensor:
        """See `expert_numbers`."""
        return expert_numbers(self.neuron_ids, num_experts)

    def expert_means(self, num_experts: int) -> Tensor:
        """Mean row of each of this home's `num_experts` experts, in at least fp32, without gradients."""
        rows_FH = self.rows().detach()
        dtype = torch.promote_types(rows_FH.dtype, torch.float32)
        return rows_FH.view(num_experts, -1, rows_FH.shape[1]).mean(dim=1, dtype=dtype)


def expert_numbers(neuron_ids_F: Tensor, num_experts: int) -> Tensor:
    """A number for the expert at each position, [E] int64, that is the same on every layout: by lowest neuron."""
    lowest_E = neuron_ids_F.view(num_experts, -1).min(dim=1).values
    return lowest_E.argsort().argsort()
