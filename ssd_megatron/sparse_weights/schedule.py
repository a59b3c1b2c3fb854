"""When masks change, and by how much."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class MaskSchedule:
    """Updates after every `train_steps / updates` steps of a run; the share that is pruned decays by a cosine.

    After the last step it is 0, so that the last of the `updates` has nothing to do; `updates` 0: masks stay.
    Source: Structured Dynamic Sparse Pre-Training of BERT (arXiv 2108.06277).
    """

    train_steps: int
    updates: int
    prune_ratio: float

    def update_after(self, step: int) -> int | None:
        """Number, from 1, of the update that is due after a step; None if none is."""
        number = -(-step * self.updates // self.train_steps)
        due = 0 < number < self.updates and number * self.train_steps // self.updates == step
        return number if due else None

    def share(self, step: int) -> float:
        """Share of the live blocks that an update after `step` prunes: a cosine from `prune_ratio` to 0."""
        return self.prune_ratio * (1 + math.cos(math.pi * step / self.train_steps)) / 2
