"""Tiles: so many tokens in a row of one sequence that share their experts.

Shapes: s positions, b sequences, H hidden, G tokens of a tile, R = ceil(s / G) tiles of a sequence (the last may be
shorter), M = R * b tiles in all, tile by tile like tokens; X anything.

A tile's experts are chosen from tokens that all of its tokens may see: those of the tile before. The first tile has
none before it and goes by its first token, which all its tokens see. So no token has a part in what comes before it.
"""

import torch
from torch import Tensor


def tile_inputs(x_sbH: Tensor, size: int) -> Tensor:
    """What a router sees of each tile, [M, H]: the mean of the tile before, of the first tile its first token.

    For scores that are linear in x, the score of the mean is the mean of the scores. Gradients reach x.
    """
    _, batch, width = x_sbH.shape
    before = max(0, num_tiles(len(x_sbH), size) - 1)
    tiles_RGbH = x_sbH[: before * size].reshape(before, size, batch, width)
    means_RbH = tiles_RGbH.mean(dim=1, dtype=torch.promote_types(x_sbH.dtype, torch.float32)).to(x_sbH.dtype)
    return torch.cat([x_sbH[:1], means_RbH]).flatten(0, 1)


def num_tiles(length: int, size: int) -> int:
    """Tiles of a sequence of `length` tokens."""
    return -(-length // size)


def of_tokens(of_tiles_MX: Tensor, length: int, batch: int, size: int) -> Tensor:
    """What each token's tile has, [s * b, X]; gradients of a tile's tokens add up."""
    of_tiles_RbX = of_tiles_MX.view(num_tiles(length, size), batch, of_tiles_MX.shape[1])
    return of_tiles_RbX.repeat_interleave(size, dim=0)[:length].flatten(0, 1)


def cut(x_sbH: Tensor, size: int) -> Tensor:
    """The tokens of each tile in one piece, [M, G, H]; the size divides s. A copy if there are several sequences."""
    length, batch, width = x_sbH.shape
    return x_sbH.reshape(length // size, size, batch, width).transpose(1, 2).flatten(0, 1)


def join(y_MGH: Tensor, length: int, batch: int) -> Tensor:
    """Tiles back as sequences, [s, b, H]."""
    _, size, width = y_MGH.shape
    return y_MGH.view(length // size, batch, size, width).transpose(1, 2).flatten(0, 1)
