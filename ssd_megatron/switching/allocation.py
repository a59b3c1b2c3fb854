"""How many experts each layer computes in a sparse phase.

Layers differ: the first fires densely, later ones sparsely. With the same number of experts everywhere the first layer
loses most of its output and the others hardly anything. So the experts of all layers (layers x top_k) are dealt out
where the probe batch shows that they hold most, at the same cost. Not in the SSD paper; docs/log.md has what it gives.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from ssd_megatron.ffn.switchable import SwitchableFFN
from ssd_megatron.switching.statistics import ProbeBatch, observed


@torch.no_grad()
def held_shares(ffns: Mapping[str, SwitchableFFN], probe: ProbeBatch) -> dict[str, Tensor]:
    """What a token's best k experts hold of a network's output, for k = 1..E: [E] float64 each (collective).

    A neuron's part is the square of its output times the norm of its row of w_out; experts are ranked by the router.
    To be called when neurons are grouped and routers are set.
    """
    sums = {name: torch.zeros(ffn.settings.num_experts, dtype=torch.float64) for name, ffn in ffns.items()}

    def watch(name: str, ffn: SwitchableFFN, x_TH: Tensor, pre_TF: Tensor) -> None:
        bank, experts = ffn.bank, ffn.settings.num_experts
        hidden_TF = bank.tensors().hidden(bank.activation.act(pre_TF.clone()), x_TH).float()
        parts_TF = hidden_TF.square() * bank.w_out.float().square().sum(1)
        parts_TE = parts_TF.view(len(x_TH), experts, -1).sum(2)
        sums[name] += parts_TE.gather(1, ffn.router.ranking(x_TH, bank.rows())).double().sum(0).cpu()

    observers = {name: (lambda x, pre, name=name, ffn=ffn: watch(name, ffn, x, pre)) for name, ffn in ffns.items()}
    with observed(ffns, observers):
        for batch in probe.batches:
            probe.token_losses(batch)
    for name, total in sums.items():
        total = total.to(probe.topology.device)
        dist.all_reduce(total, group=probe.topology.data_parallel_group)
        sums[name] = (total.cumsum(0) / total.sum().clamp_min(torch.finfo(torch.float64).tiny)).cpu()
    return sums


def allocate_experts(shares: Mapping[str, Tensor], top_k: int, least: int) -> dict[str, int]:
    """Deal out layers x top_k experts: one at a time to the layer whose next expert holds most.

    Args:
        shares: [E] by layer, share held by the best k experts.
        top_k: mean over layers.
        least: every layer gets at least this many.
    """
    allocated = dict.fromkeys(shares, least)
    for _ in range((top_k - least) * len(shares)):
        gains = {name: float(s[allocated[name]] - s[allocated[name] - 1]) for name, s in shares.items()
                 if allocated[name] < len(s)}  # fmt: skip
        allocated[max(gains, key=lambda name: gains[name])] += 1
    return allocated
