"""Short fine-tuning of a model before or after its neurons are split."""

import math
from collections.abc import Iterable

import torch
from rich.progress import Progress
from torch import nn

from ssd_megatron.errors import ConfigError
from ssd_megatron.moefication.task import Task

WARMUP = 0.1  # of the steps


def tune(
    task: Task, parameters: Iterable[nn.Parameter], steps: int, rate: float, name: str, progress: Progress
) -> None:
    """Train some parameters on the task's batches; the others stay as they are.

    Args:
        rate: learning rate, after a linear warmup; it falls to 0 by a cosine.
        name: of the progress bar.
    Raises:
        ConfigError: the loss is not finite any more.
    """
    chosen = list(parameters)
    everything = task.parameters.values()
    for parameter in everything:
        parameter.requires_grad_(any(parameter is one for one in chosen))
    optimizer = torch.optim.AdamW(chosen, lr=rate, weight_decay=0.0)
    warmup = max(1, round(WARMUP * steps))
    rising = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=warmup)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warmup))
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [rising, falling], [warmup])
    bar = progress.add_task(name, total=steps)
    for _, batch in zip(range(steps), task.batches(), strict=False):
        optimizer.zero_grad(set_to_none=True)
        loss = task.forward_backward(batch)
        if not math.isfinite(loss):
            raise ConfigError(f"the loss is {loss} while {name}: use a smaller learning rate than {rate:g}")
        nn.utils.clip_grad_norm_(chosen, 1.0)
        optimizer.step()
        schedule.step()
        progress.update(bar, advance=1, description=f"{name}, loss {loss:.4f}")
    for parameter in everything:
        parameter.requires_grad_(True)
