"""Losses and gradients of the projection onto the vocabulary against torch's, and what is kept for backward."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_megatron.config.schema import ParallelConfig
from ssd_megatron.model import cross_entropy
from ssd_megatron.model.cross_entropy import projected_losses
from ssd_megatron.parallel.topology import Topology
from tests.ranks import run_ranks
from tests.small_engine import build, random_batch, run_config

TOKENS, HIDDEN, VOCABULARY = 7, 5, 12
Found = tuple[Tensor, Tensor, Tensor, Tensor]


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Inputs, weights, biases, labels and the gradient of each loss."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (3 * torch.randn(rows, HIDDEN, generator=generator) for rows in (TOKENS, VOCABULARY))
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    bias = torch.randn(VOCABULARY, generator=generator)
    return x.to(dtype), weight.to(dtype), bias.to(dtype), labels, torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 1.0, 3.0])


def expected(dtype: torch.dtype) -> Found:
    x, weight, bias, labels, dlosses = problem(dtype)
    x, weight, bias = (tensor.double().requires_grad_() for tensor in (x, weight, bias))
    losses = F.cross_entropy(x @ weight.t() + bias, labels, reduction="none")
    losses.backward(dlosses.double())
    assert x.grad is not None and weight.grad is not None and bias.grad is not None
    return losses.detach(), x.grad, weight.grad, bias.grad


def found(topology: Topology, dtype: torch.dtype, chunk: int | None) -> Found:
    """Losses, this rank's part of the inputs' gradient, and the gradients of its part of weights and biases."""
    cross_entropy.WORK_BYTES["cpu"] = 2 * 4 * VOCABULARY  # two rows at a time
    x, weight, bias, labels, dlosses = problem(dtype)
    x.requires_grad_()
    size, rank = topology.tensor.size, topology.tensor.rank
    mine, my_bias = (whole.chunk(size)[rank].clone().requires_grad_() for whole in (weight, bias))
    losses = projected_losses(x, mine, my_bias, labels, topology.tensor, chunk)
    assert losses.dtype == torch.float32
    losses.backward(dlosses)
    assert x.grad is not None and mine.grad is not None and my_bias.grad is not None
    return losses.detach(), x.grad, mine.grad, my_bias.grad


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_losses_and_gradients_are_those_of_cross_entropy(ranks: int, dtype: torch.dtype, tolerance: float) -> None:
    losses, dx, dweight, dbias = expected(dtype)
    for chunk in (None, 3, 100):
        parts = run_ranks(ranks, found, dtype, chunk, parallel=ParallelConfig(tensor_parallel_size=ranks))
        for mine, *_ in parts:
            torch.testing.assert_close(mine.double(), losses, rtol=tolerance, atol=tolerance)
        pairs = [(sum(part[1].double() for part in parts), dx)]
        pairs += [(torch.cat([part[i] for part in parts]), right) for i, right in ((2, dweight), (3, dbias))]
        for gradient, right in pairs:
            assert torch.dist(gradient.double(), right) <= tolerance * right.norm(), chunk


def label_outside(topology: Topology) -> tuple[Tensor, Tensor]:
    x, weight, _, labels, _ = problem(torch.float32)
    labels[0], labels[1] = -1, VOCABULARY
    losses = projected_losses(x, weight.requires_grad_(), None, labels, topology.tensor)
    return losses.detach(), x @ weight.detach().t()


def test_a_label_outside_of_the_vocabulary_has_a_finite_loss() -> None:
    losses, logits = run_ranks(1, label_outside)[0]
    torch.testing.assert_close(losses[:2], logits[:2].logsumexp(1))


def kept_bytes(topology: Topology, chunk: int | None) -> int:
    """What autograd keeps beside inputs and weights."""
    x, weight = torch.randn(64, 8, dtype=torch.bfloat16), torch.randn(256, 8, dtype=torch.bfloat16, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        projected_losses(x, weight, None, torch.zeros(64, dtype=torch.int64), topology.tensor, chunk)
    return sum(t.nbytes for t in kept if t.data_ptr() not in (x.data_ptr(), weight.data_ptr()))


@pytest.mark.parametrize(("chunk", "logits"), [(None, 64 * 256 * 2), (16, 0)])
def test_logits_are_kept_once_in_the_dtype_of_the_weights_or_not_at_all(chunk: int | None, logits: int) -> None:
    assert run_ranks(1, kept_bytes, chunk) == [logits + 64 * (4 + 8)]  # normalizers and label columns


def losses_by_chunk(topology: Topology, parallel: dict[str, int]) -> list[list[float]]:
    """Losses and gradient norms of three steps, logits kept and in chunks."""
    curves = []
    for chunk in (None, 24):
        config = run_config(topology.world.size, parallel=parallel, training={"loss_chunk_tokens": chunk})
        _, engine = build(topology, config)
        batches = [random_batch(config, seed) for seed in range(config.gradient_accumulation_steps)]
        results = [engine.train_step(batches) for _ in range(3)]
        curves.append([*(r.loss for r in results), *(r.grad_norm for r in results), engine.mean_loss(batches)])
        engine.close()
    return curves


@pytest.mark.parametrize("parallel", [{}, {"pipeline_parallel_size": 2}, {"tensor_parallel_size": 2}], ids=str)
def test_chunks_change_no_step_and_no_evaluation(parallel: dict[str, int]) -> None:
    ranks = 2 if parallel else 1
    for whole, chunked in run_ranks(ranks, losses_by_chunk, parallel, parallel=ParallelConfig(**parallel)):
        assert chunked == pytest.approx(whole, rel=2e-6)
