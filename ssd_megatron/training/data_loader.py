"""Which samples each rank reads at each step: a function of the step alone, so that a resumed run goes on exactly."""

import signal
from collections.abc import Generator, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ssd_megatron.training.signals import SIGNALS


class StepSampler(Sampler[list[int]]):
    """Microbatches of one data-parallel rank, in order, from `first_step` on.

    Global batch of step t (from 1): samples (t-1) * B .. t * B - 1; microbatch m of rank r is its
    (m * ranks + r)-th run of `micro_batch_size` samples.
    """

    def __init__(
        self, *, first_step: int, last_step: int, micro_batch_size: int, accumulation: int, rank: int, ranks: int
    ) -> None:
        self._steps = range(first_step, last_step + 1)
        self._micro, self._accumulation, self._rank, self._ranks = micro_batch_size, accumulation, rank, ranks

    def __iter__(self) -> Iterator[list[int]]:
        batch = self._micro * self._accumulation * self._ranks
        for step in self._steps:
            for microbatch in range(self._accumulation):
                start = (step - 1) * batch + (microbatch * self._ranks + self._rank) * self._micro
                yield list(range(start, start + self._micro))

    def __len__(self) -> int:
        return len(self._steps) * self._accumulation


def microbatches(
    dataset: Dataset[dict[str, Tensor]], sampler: StepSampler, device: torch.device, num_workers: int
) -> Generator[dict[str, Tensor], None, None]:
    """Batches of the samples' fields on `device`, each [micro_batch_size, ...]. To be closed: workers end with it."""
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate,
        worker_init_fn=_leave_signals_to_the_rank,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # the default one belongs to dropout
        persistent_workers=num_workers > 0,
    )
    for batch in loader:
        yield to_device(batch, device)


def _leave_signals_to_the_rank(_worker: int) -> None:
    """A request to stop may go to all processes of a job, and a rank whose worker ends cannot save any more."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def collate(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: values.to(device, non_blocking=True) for name, values in batch.items()}
