"""Is what a model says with CUDA graphs what it says without? Part of benchmarks.check_gpu, which runs it."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.inference import DEVICE, build, set_mode
from benchmarks.row import Row
from ssd_megatron.config.model import ModelConfig
from ssd_megatron.inference.cache import pad_in_front
from ssd_megatron.inference.ffn import Mode
from ssd_megatron.inference.generate import generate
from ssd_megatron.inference.model import CausalModel, Model
from ssd_megatron.inference.sampling import Sampling
from ssd_megatron.inference.steps import Continues, steps_of
from ssd_megatron.inference.t5 import EncoderDecoder

NEW_TOKENS = 140  # more than a graph's slots
TOLERANCE = 2e-2
SIZES: dict[str, Any] = {"num_layers": 3, "hidden_size": 512, "num_attention_heads": 8, "seq_length": 512}
MODELS: dict[str, dict[str, Any]] = {
    "gpt": {},
    "gpt, rope, gate": {"position_embedding": "rope", "num_query_groups": 2, "activation": "reglu", "add_bias": False},
    "t5": {"family": "t5", "decoder_seq_length": 256},
}
MODES: tuple[Mode, ...] = ("dense", "sparse")


def rows() -> Iterator[Row]:
    """In fp32 tokens, and in bf16, where a choice may hang on the last bit, logits after the same tokens; texts of
    different lengths, one or two (kernels of their own) and four."""
    for (name, settings), mode in itertools.product(MODELS.items(), MODES):
        config = ModelConfig(vocab_size=8192, **SIZES | settings)
        for batch in (1, 2, 4):
            model = build(config, torch.float32, 16)
            set_mode(model, mode, 0.25)
            launched, replayed = (_texts(model, batch, graphs) for graphs in (False, True))
            differ = sum(a != b for a, b in zip(launched, replayed, strict=True))
            yield Row(f"{name}, {mode}, {batch} texts: steps of other tokens in a CUDA graph", differ, 0.0, 0.0)
        model = build(config, torch.bfloat16, 16)
        set_mode(model, mode, 0.25)
        exact, found = (_logits(model, graphs) for graphs in (False, True))
        error = float(((found - exact).norm(dim=-1) / exact.norm(dim=-1)).median())
        yield Row(f"{name}, {mode}, bf16: median relative error of logits in a CUDA graph", error, TOLERANCE, 0.0)


def _continued(model: Model, batch: int) -> tuple[Continues, list[list[int]]]:
    numbers = torch.randint(0, 8192, (batch, 40), generator=torch.Generator().manual_seed(batch))
    if isinstance(model, EncoderDecoder):
        return model.encode(numbers.to(DEVICE)), [[0]] * batch
    assert isinstance(model, CausalModel)
    return model, [row[: 40 - 9 * text] for text, row in enumerate(numbers.tolist())]


def _texts(model: Model, batch: int, graphs: bool) -> list[list[int | None]]:
    """Two times, the second time with memory and graphs of the first."""
    model.graphs = graphs
    continued, prompts = _continued(model, batch)
    first = list(generate(continued, prompts, Sampling(greedy=True), NEW_TOKENS))
    assert (continued.kept is not None) == graphs
    return [*first, *generate(continued, prompts[::-1], Sampling(seed=1), NEW_TOKENS)]


def _logits(model: Model, graphs: bool) -> Tensor:
    """After each of some tokens, [b, s, v]."""
    model.graphs = graphs
    continued, prompts = _continued(model, 2)
    tokens_bs, padding_b = pad_in_front(prompts, DEVICE)
    fed = torch.randint(0, 8192, (2, NEW_TOKENS), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    with steps_of(continued, tokens_bs, padding_b, NEW_TOKENS + 1) as step:
        found = [step(tokens_bs).clone()]
        found += [step(fed[:, place, None]).clone() for place in range(NEW_TOKENS)]
    return torch.cat(found, dim=1)
