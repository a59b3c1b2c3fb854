"""The benchmark of models in use: what it compares is alike, and its bound is that of the weights read."""

import pytest
import torch

from benchmarks.inference import Size, build, decode_rows, in_transformers, prompt_row, shape, weights_read
from ssd_megatron.config.model import ModelConfig

TINY = Size(shape(128, 1, 64), new_tokens=2, prompt_layers=1, prompt_tokens=32, turns=1)


def test_transformers_has_the_same_weights() -> None:
    model = build(TINY.model, torch.float32, 16)
    tokens = torch.randint(0, 8192, (1, 12))
    with torch.no_grad():
        theirs = in_transformers(model)(tokens).logits
    torch.testing.assert_close(model(tokens), theirs, rtol=1e-4, atol=1e-4)


def test_rows_have_what_was_measured() -> None:
    rows = [*decode_rows(TINY, torch.float32), prompt_row(TINY, torch.float32)]
    assert [row.at_least for row in rows] == [False, False, True, True, True, True]
    assert all(row.value > 0 for row in rows)
    assert "transformers tokens/s" in rows[2].details and rows[3].ideal > rows[2].ideal == 1


def test_the_bound_counts_weights() -> None:
    model = ModelConfig(
        num_layers=2, hidden_size=8, num_attention_heads=1, seq_length=4, vocab_size=128, add_bias=False
    )
    attention, networks, head = 2 * 4 * 64, 2 * 8 * 32 * 1.5, 128 * 8
    size = Size(model, 1, 1, 1, 1)
    assert weights_read(size, 1.0) == pytest.approx(attention + networks + head)
    assert weights_read(size, 0.25) == pytest.approx(attention + networks / 4 + head + 2 * size.experts * 8)
