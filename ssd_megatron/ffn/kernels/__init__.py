"""The sparse feed-forward network behind one function, by one of several backends.

Shapes: T tokens, H hidden, F neurons, E experts, K experts per token.
"""

import math
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from ssd_megatron.errors import ConfigError
from ssd_megatron.ffn.activations import Activation
from ssd_megatron.ffn.bank import NeuronTensors
from ssd_megatron.ffn.kernels import cpp_build, cpp_ffn, reference, torch_bmm, torch_tiles

Kernel = Callable[[Tensor, Tensor, Tensor | None, NeuronTensors, Activation, int, bool], Tensor]

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _triton(
    x_TH: Tensor,
    expert_ids_TK: Tensor,
    gates_TK: Tensor | None,
    bank: NeuronTensors,
    activation: Activation,
    num_experts: int,
    scaled: bool,
) -> Tensor:
    from ssd_megatron.ffn.kernels import triton_ffn  # where it is used: the package triton need not be there

    return triton_ffn.sparse_ffn(x_TH, expert_ids_TK, gates_TK, bank, activation, num_experts, scaled)


BACKENDS: dict[str, Kernel] = {
    "reference": reference.sparse_ffn,
    "torch": torch_bmm.sparse_ffn,
    "cpp": cpp_ffn.sparse_ffn,
    "triton": _triton,
}
# Bytes of an expert's matrix up to which cpp is faster than torch: from there on it leaves the cache (docs/log.md).
CPP_UP_TO = 2**20
# Those that a machine may lack something for; `auto` takes the first that the device can have, after a trial.
SPECIAL = ("cpp", "triton")


def sparse_ffn(
    x_TH: Tensor,
    expert_ids_TK: Tensor,
    gates_TK: Tensor | None,
    bank: NeuronTensors,
    activation: Activation,
    num_experts: int,
    backend: str,
    scaled: bool = False,
) -> Tensor:
    """The network restricted to the chosen experts of each token, without the last bias.

    A gate's gradient is that of an expert's output scaled by it: dgate = sum over the expert's neurons of (gradient of
    the neuron's scaled output) * (its output). Its value is 1 by definition, and nothing is multiplied by it, unless
    the gates are `scaled`.

    Args:
        x_TH: inputs, the bank's dtype.
        expert_ids_TK: int64, no expert twice for one token; -1 for one that is computed elsewhere.
        gates_TK: any float dtype, or None when the router learns nothing.
        bank: per-neuron tensors; expert e is rows [e * F/E, (e + 1) * F/E).
        num_experts: E, divides F.
        backend: a name in BACKENDS.
        scaled: an expert's output is multiplied by its gate; needs gates.
    Returns:
        y_TH in x's dtype. Gradients reach x, the gates and every tensor of the bank.
    """
    assert x_TH.dtype == bank.w_in.dtype, (x_TH.dtype, bank.w_in.dtype)
    assert gates_TK is not None or not scaled
    return BACKENDS[backend](x_TH, expert_ids_TK, gates_TK, bank, activation, num_experts, scaled)


def tiles_pay(backend: str, tile_size: int, expert_size: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `torch_tiles.tiled_ffn` is this backend's faster way for tiles of tokens that share their experts.

    The backend cpp needs none: it gathers in the cache. On GPUs sums over tiles would wait for the device.
    """
    return backend == "torch" and device.type == "cpu" and torch_tiles.pays(tile_size, expert_size, dtype)


def choose_backend(
    requested: str, device: torch.device, dtype: torch.dtype, expert_shape: tuple[int, int] | None = None
) -> tuple[str, str]:
    """Resolve `ssd.backend` to a name in BACKENDS: cpp on CPUs and triton on CUDA devices where they can be had, else
    torch, also where it is faster. Compiles nothing.

    Args:
        expert_shape: neurons and hidden size of an expert; small ones without it.
    Returns:
        The name, and the reason in words for the log.
    Raises:
        ConfigError: the backend does not exist, or cannot run here.
    """
    where = f"{device.type}, {str(dtype).removeprefix('torch.')}"
    if requested not in ("auto", *BACKENDS):
        raise ConfigError(f"ssd.backend ({requested}) is unknown: use one of auto, {', '.join(BACKENDS)}")
    if requested == "auto":
        special, gain = (
            ("cpp", "takes about two thirds of its time") if device.type == "cpu" else ("triton", "is faster")
        )
        if special == "cpp" and expert_shape is not None and math.prod(expert_shape) * dtype.itemsize > CPP_UP_TO:
            size = " x ".join(map(str, expert_shape))
            return "torch", f"sparse kernels: torch (faster than cpp for experts of {size}; {where})"
        lacking = _lacking(special, device, dtype)
        if lacking is None:
            return special, f"sparse kernels: {special} (the fastest there is for {where})"
        return "torch", f"sparse kernels: torch ({special}, which {gain}, needs {lacking}; {where})"
    if requested in SPECIAL and (lacking := _lacking(requested, device, dtype)) is not None:
        raise ConfigError(f"ssd.backend ({requested}) needs {lacking}: use auto or torch, which run everywhere")
    return requested, f"sparse kernels: {requested} (as asked; {where})"


def _lacking(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """What this process lacks for a backend of SPECIAL."""
    if backend == "triton":
        return _lacking_for_triton(device, dtype)
    if device.type != "cpu":
        return f"a CPU to compute on, and this process computes on {device.type}"
    return cpp_build.lacking(dtype)


def _lacking_for_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"a CUDA device, and this process computes on {device.type}"
    if dtype not in TRITON_DTYPES:
        return f"bf16, fp16 or fp32, not {str(dtype).removeprefix('torch.')}"
    if find_spec("triton") is None:
        return "the package triton, which is not installed"
    return None
