"""Memory that kernels use inside a call, shared by all layers."""

import math

import torch
from torch import Tensor

_workspace: dict[tuple[str, torch.dtype], Tensor] = {}


def scratch(name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Uninitialised memory of `like`'s dtype that lives until the next call with the same name.

    On CPU one growing buffer per name and dtype serves all layers: fresh large tensors would cost more in page faults
    than in use. It must never leave a forward or backward call, be it in a result or saved for the backward. On a GPU
    the caching allocator does this already, and knows about streams.
    """
    if like.device.type != "cpu":
        return like.new_empty(shape)
    size = math.prod(shape)
    buffer = _workspace.get((name, like.dtype))
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):
            buffer = _workspace[name, like.dtype] = torch.empty(size, dtype=like.dtype)
    return buffer[:size].view(shape)
