"""Our job in a benchmark of whole steps: either mode at any step, its networks alone, its memory."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.peak_memory import PeakMemory
from benchmarks.row import Row
from benchmarks.timing import wait
from ssd_megatron.config.load import RunConfig
from ssd_megatron.ffn.kernels import cpp_products
from ssd_megatron.ffn.kernels.dispatch import dispatch
from ssd_megatron.ffn.switchable import Mode, SwitchableFFN
from ssd_megatron.parallel.device import IS_CUDA
from ssd_megatron.parallel.topology import Topology
from ssd_megatron.training.synthetic import SyntheticJob


class Ours:
    """The real job, in either mode."""

    def __init__(self, config: RunConfig, topology: Topology) -> None:
        self.config = config
        self.job = SyntheticJob.build(config, topology)
        self.steps = 0
        self.loss = float("nan")

    def step(self, mode: Mode) -> None:
        self.job.coordinator.set_mode(mode)
        self.steps += 1
        self.loss = self.job.train_step(self.steps).loss

    @property
    def networks(self) -> list[SwitchableFFN]:
        return list(self.job.model.ffns.values())


def network_variants(ours: Ours) -> dict[str, Callable[[int], object]]:
    """Forward and backward of all layers' networks in both modes, and what chooses and places experts, alone.

    Gradients come from autograd.grad: nothing reaches the engine's buffers.
    """
    seen: list[tuple[SwitchableFFN, Tensor]] = []

    def keep(network: SwitchableFFN, inputs: tuple[Tensor, ...]) -> None:
        seen.append((network, inputs[0].detach().clone().requires_grad_()))

    hooks = [network.register_forward_pre_hook(keep) for network in ours.networks]
    ours.step("dense")
    for hook in hooks:
        hook.remove()
    seen = seen[: len(ours.networks)]
    dys = [torch.randn_like(x) for _, x in seen]

    def run(mode: Mode, _: int) -> None:
        ours.job.coordinator.set_mode(mode)
        for (network, x), dy in zip(seen, dys, strict=True):
            wanted = [x, *network.bank.neuron_parameters().values()]
            wanted += [network.router.weight] if mode == "sparse" else []
            torch.autograd.grad(network(x)[0], wanted, dy)

    def routing(_: int) -> None:
        for network, x in seen:
            x_TH = x.flatten(0, 1)
            ids_TK, gates_TK, *_ = network.router.route(x_TH)
            sort(ids_TK, network.settings.num_experts, x_TH.shape[1] * x_TH.element_size())
            assert gates_TK is not None
            torch.autograd.grad(gates_TK, [x, network.router.weight], torch.ones_like(gates_TK))

    sort = _sorting_of(ours.networks[0].settings.backend)
    return {"dense network": partial(run, "dense"), "sparse network": partial(run, "sparse"), "routing": routing}


def _sorting_of(backend: str) -> Callable[[Tensor, int, int], object]:
    """How a backend sorts token copies by expert: of ids [T, K], number of experts, bytes of a row."""
    if backend == "torch":
        return dispatch
    if backend == "cpp":
        return lambda ids_TK, experts, _: cpp_products.sort_copies(ids_TK, experts)
    from ssd_megatron.ffn.kernels.triton_routing import sort_copies  # where the package triton is

    return lambda ids_TK, experts, _: sort_copies(ids_TK, experts)


def switch_and_compare_memory(ours: Ours, goal: float) -> Row:
    """Dense before anything sparse has run, then sparse: workspaces that outlive a step count."""
    if IS_CUDA:
        dense = _peak_of_a_cuda_step(ours, "dense")
        ours.job.switch(1)
        sparse = _peak_of_a_cuda_step(ours, "sparse")
    else:
        with PeakMemory() as made:
            ours.step("dense")
            dense = made.peak
            ours.job.switch(1)
            made.peak = made.live
            ours.step("sparse")
            sparse = made.peak
    model, ssd = ours.config.ssd_megatron.model, ours.config.ssd_megatron.ssd
    tokens = ours.config.micro_batch_size * model.seq_length
    size = torch.finfo(getattr(torch, ours.config.dtype)).bits // 8
    # What dense mode has more of: neurons' outputs of every layer, and in backward two gradients of one layer's.
    hidden = (model.num_layers + 2) * tokens * model.ffn_hidden_size * size * (3 if model.gated else 1)
    return Row(
        "peak memory of a step, sparse / dense",
        sparse / dense,
        goal,
        1 - hidden * (1 - ssd.top_k / ssd.num_experts) / dense,
        details={"dense MiB": dense / 2**20, "sparse MiB": sparse / 2**20},
    )


def _peak_of_a_cuda_step(ours: Ours, mode: Mode) -> int:
    wait()
    torch.cuda.reset_peak_memory_stats()
    ours.step(mode)
    wait()
    return torch.cuda.max_memory_allocated()
