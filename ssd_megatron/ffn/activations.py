"""Activations of the feed-forward network, and their slopes.

A gated network applies the activation to the gate's pre-activation and multiplies by the other half
(Shazeer, arXiv 2002.05202); an ungated one applies it to its only pre-activation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_aten: Any = torch.ops.aten  # the out= forms of backward operators exist only here


@dataclass(frozen=True)
class Activation:
    """One activation phi, as the dense network and every sparse kernel use it.

    Attributes:
        name: as written in ds.json.
        phi: the function's own name, for kernels that compute it themselves: relu, squared_relu, gelu, gelu_tanh or
            silu.
        gated: the network has a gate (`w_gate`).
        sparse: phi is exactly 0 for pre <= 0, so that most neurons do not fire.
        act: phi(pre). The sparse ones clamp `pre` in place at 0 and may return it: one tensor is then output, mask
            and all that a backward needs.
        act_again: phi(pre) once more, from `pre` as `act` left it, writing nothing.
        slope_: overwrites its first argument, the gradient of phi(pre), with that of pre; also from `pre` as `act`
            left it.
    """

    name: str
    phi: str
    gated: bool
    sparse: bool
    act: Callable[[Tensor], Tensor]
    act_again: Callable[[Tensor], Tensor]
    slope_: Callable[[Tensor, Tensor], Tensor]


def _clamp(pre: Tensor) -> Tensor:
    return pre.relu_()


def _itself(pre: Tensor) -> Tensor:
    return pre


def _relu_slope_(d: Tensor, pre: Tensor) -> Tensor:
    _aten.threshold_backward.grad_input(d, pre, 0, grad_input=d)
    return d


def _clamp_and_square(pre: Tensor) -> Tensor:
    return pre.relu_().square()


def _squared_relu_slope_(d: Tensor, pre: Tensor) -> Tensor:
    return d.mul_(pre).mul_(2)  # pre is clamped: 0 where the neuron did not fire


def _gelu_slope_(d: Tensor, pre: Tensor) -> Tensor:
    _aten.gelu_backward.grad_input(d, pre, grad_input=d)
    return d


def _gelu_tanh_slope_(d: Tensor, pre: Tensor) -> Tensor:
    _aten.gelu_backward.grad_input(d, pre, approximate="tanh", grad_input=d)
    return d


def _silu_slope_(d: Tensor, pre: Tensor) -> Tensor:
    _aten.silu_backward.grad_input(d, pre, grad_input=d)
    return d


def _relu(name: str, *, gated: bool) -> Activation:
    return Activation(name, "relu", gated, sparse=True, act=_clamp, act_again=_itself, slope_=_relu_slope_)


def _squared_relu() -> Activation:
    return Activation(
        "squared_relu", "squared_relu", False, True, _clamp_and_square, torch.square, _squared_relu_slope_
    )


def _gelu(name: str, *, gated: bool) -> Activation:
    return Activation(name, "gelu", gated, sparse=False, act=F.gelu, act_again=F.gelu, slope_=_gelu_slope_)


def _gelu_tanh(name: str, *, gated: bool) -> Activation:
    act = partial(F.gelu, approximate="tanh")
    return Activation(name, "gelu_tanh", gated, sparse=False, act=act, act_again=act, slope_=_gelu_tanh_slope_)


def _silu(name: str, *, gated: bool) -> Activation:
    return Activation(name, "silu", gated, sparse=False, act=F.silu, act_again=F.silu, slope_=_silu_slope_)


ACTIVATIONS = {
    "relu": _relu("relu", gated=False),
    "squared_relu": _squared_relu(),
    "reglu": _relu("reglu", gated=True),
    "gelu": _gelu("gelu", gated=False),
    "gelu_tanh": _gelu_tanh("gelu_tanh", gated=False),
    "silu": _silu("silu", gated=False),
    "geglu": _gelu("geglu", gated=True),
    "geglu_tanh": _gelu_tanh("geglu_tanh", gated=True),
    "swiglu": _silu("swiglu", gated=True),
}
