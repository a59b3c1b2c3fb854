"""A small problem by which a backend shows on this device, before anything depends on it, that it is right there.

Shapes: T tokens, H hidden, F neurons, E experts, K experts per token.
"""

import importlib
import importlib.util
import warnings

import torch
from torch import Tensor

from ssd_megatron.ffn.activations import ACTIVATIONS
from ssd_megatron.ffn.bank import NeuronBank
from ssd_megatron.ffn.kernels import SPECIAL, choose_backend, sparse_ffn
from ssd_megatron.ffn.routers import Router

TOKENS, HIDDEN, EXPERTS, TOP_K, EXPERT_SIZE = 192, 128, 4, 2, 64
ROUTERS = ("centroid", "switch")  # gates that are 1, for which cpp has kernels, and gates that scale outputs
# Norm of the error of the output and of each gradient, relative to brute force in fp32; fp32 may compute in TF32.
TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def trial(backend: str, device: torch.device, dtype: torch.dtype, activation: str) -> str | None:
    """Compare outputs and all gradients with brute force, of experts that each of ROUTERS chooses.

    Returns:
        what is wrong, None if nothing.
    """
    failures = _failures()
    for kind in ROUTERS:
        try:
            found = _run(backend, device, dtype, activation, kind)
        except failures as failure:
            return f"{type(failure).__name__}: {str(failure).strip().partition(chr(10))[0]}"
        expected = _run("reference", device, torch.float32, activation, kind)
        for name, wanted in expected.items():
            error = float(torch.dist(found[name].float(), wanted) / wanted.norm())
            if not error <= TOLERANCE[dtype]:
                return f"{name}, router {kind}, differs from brute force by {error:.0e}"
    return None


def fastest_right(device: torch.device, dtype: torch.dtype, activation: str, expert_shape: tuple[int, int]) -> str:
    """The backend that `auto` takes, of one process: torch, with a warning, if the faster one is wrong here.

    Args:
        expert_shape: neurons and hidden size of an expert.
    """
    backend, _ = choose_backend("auto", device, dtype, expert_shape)
    wrong = trial(backend, device, dtype, activation) if backend in SPECIAL else None
    if wrong is None:
        return backend
    warnings.warn(f"sparse kernels: torch ({backend}, which should be faster, fails its trial: {wrong})", stacklevel=2)
    return "torch"


def router_backend(device: torch.device, dtype: torch.dtype, activation: str) -> str:
    """Whose kernels score inputs faster, whatever the size of experts: on CPUs in bf16 `auto`'s for small ones, as
    torch has no products of bf16 with fp32 sums there and copies all inputs; else torch's (docs/log.md, 2026-11-28)."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return "torch"
    return fastest_right(device, dtype, activation, (1, 1))


@torch.inference_mode(False)
@torch.enable_grad()
def _run(backend: str, device: torch.device, dtype: torch.dtype, activation: str, kind: str) -> dict[str, Tensor]:
    """Output and gradients by name, from the same numbers for every backend and dtype."""
    generator = torch.Generator().manual_seed(0)
    # Numbers that all dtypes have.
    x_TH, dy_TH = (torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16() for _ in range(2))
    router = Router(HIDDEN, EXPERTS, TOP_K, "straight_through", kind=kind, backend=backend, dtype=dtype)
    bank = NeuronBank(HIDDEN, EXPERTS * EXPERT_SIZE, activation, add_bias=True, dtype=dtype)
    with torch.no_grad():
        for tensor in (router.weight, *bank.neuron_parameters().values()):
            tensor.copy_((torch.randn(tensor.shape, generator=generator) / HIDDEN**0.5).bfloat16())
    router, bank = router.to(device), bank.to(device)
    x = x_TH.to(device, dtype).requires_grad_()
    ids, gates, inputs, scaled = router.route(x)
    y = sparse_ffn(inputs, ids, gates, bank.tensors(), ACTIVATIONS[activation], EXPERTS, backend, scaled)
    torch.autograd.backward(y, dy_TH.to(device, dtype))
    named = {"the output": y, "the gradient of the inputs": x.grad, "the gradient of the router": router.weight.grad}
    named |= {f"the gradient of {name}": tensor.grad for name, tensor in bank.neuron_parameters().items()}
    return {name: tensor.detach() for name, tensor in named.items() if tensor is not None}


def _failures() -> tuple[type[Exception], ...]:
    """What kernels raise that do not compile or do not run."""
    if importlib.util.find_spec("triton") is None:
        return (RuntimeError,)
    return (RuntimeError, importlib.import_module("triton.runtime.errors").TritonError)
