"""A mean loss of several batches: each part, the losses that one mask lets through, is a sum divided by its number.

Shapes: M masks of the family's batches (`families.Fields.masks`).
"""

from collections.abc import Mapping

import torch
from torch import Tensor


def loss_parts(losses: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
    """Sums of a batch's losses by part, and their numbers: [2, M] fp64, to be added up over batches.

    Args:
        losses: by mask, as `LanguageModel` gives them.
        batch: with those masks.
    """
    sums = torch.stack([(values * batch[mask]).sum(dtype=torch.float64) for mask, values in losses.items()])
    return torch.stack([sums, torch.stack([batch[mask].sum(dtype=torch.float64) for mask in losses])])


def mean_of_parts(parts_2M: Tensor) -> Tensor:
    """The loss that training minimises, fp64: the parts' means, added up."""
    sums_M, counts_M = parts_2M
    mean: Tensor = (sums_M / counts_M).sum()
    return mean
