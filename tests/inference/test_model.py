"""The module for inference against the one that is trained: logits in both modes, with cache and padding."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ssd_megatron.errors import ConfigError
from ssd_megatron.ffn.kernels.trial import router_backend
from ssd_megatron.inference.ffn import Mode
from ssd_megatron.inference.load import load, scale_top_k
from ssd_megatron.training.checkpoint_files import CheckpointError
from ssd_megatron.training.saved_model import Settings, write_model
from tests.saved_models import LEARNED, ROPE, TOP_K, trained

MODELS = {"learned positions": LEARNED, "rope, grouped queries, gate, untied": ROPE}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_logits_are_those_of_training(tmp_path: Path, name: str, mode: Mode) -> None:
    expected = trained(**MODELS[name])
    model = load(expected.write(tmp_path), mode=mode)
    assert [ffn.top_k for ffn in model.ffns] == TOP_K
    logits = getattr(expected, mode)
    torch.testing.assert_close(model(expected.tokens), logits, rtol=1e-4, atol=1e-4)
    assert float((expected.dense - expected.sparse).abs().max()) > 0.1  # so that the modes can be told apart

    # One token at a time, a few together, and only the last.
    cache = model.new_cache(2, 16)
    parts = [model(part, cache) for part in expected.tokens.split([6, 1, 5, 1, 3], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(expected.tokens, last_only=True), logits[:, -1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_padding_changes_nothing(tmp_path: Path, name: str) -> None:
    expected = trained(**MODELS[name])
    model = load(expected.write(tmp_path), mode="sparse")
    padding_b = torch.tensor([0, 5])
    tokens = torch.stack([expected.tokens[0], torch.cat([torch.full((5,), 7), expected.tokens[1, :11]])])
    cache = model.new_cache(2, 16, padding_b)
    logits = torch.cat([model(part, cache) for part in tokens.split([12, 1, 3], dim=1)], dim=1)
    torch.testing.assert_close(logits[0], expected.sparse[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[1, 5:], expected.sparse[1, :11], rtol=1e-4, atol=1e-4)


def test_bf16_is_near(tmp_path: Path) -> None:
    expected = trained()
    model = load(expected.write(tmp_path), dtype=torch.bfloat16, mode="dense")
    cache = model.new_cache(1, 16)
    logits = torch.cat([model(token, cache) for token in expected.tokens[:1].split(1, dim=1)], dim=1)
    assert float((logits - expected.dense[:1]).norm() / expected.dense[:1].norm()) < 0.03


def test_experts_in_bf16_do_not_depend_on_whose_kernels_score(tmp_path: Path) -> None:
    expected = trained()
    model = load(expected.write(tmp_path), dtype=torch.bfloat16, mode="sparse")
    logits = model(expected.tokens)
    for ffn in model.ffns:
        assert ffn.router is not None and ffn.router.backend == router_backend(model.device, torch.bfloat16, "relu")
        ffn.router.backend = "torch"
    assert torch.equal(model(expected.tokens), logits)


def test_top_k_as_saved_scaled_and_listed(tmp_path: Path) -> None:
    folder = trained().write(tmp_path)
    assert [ffn.top_k for ffn in load(folder, top_k=1.5).ffns] == [1, 2]
    assert [ffn.top_k for ffn in load(folder, top_k=[8, 1]).ffns] == [8, 1]
    everything = load(folder, mode="sparse", top_k=8)
    torch.testing.assert_close(everything(trained().tokens), trained().dense, rtol=1e-4, atol=1e-4)
    for wrong, message in ((9, "between 1 and the model's 8 experts"), ([2], "one for each of the 2 layers")):
        with pytest.raises(ConfigError, match=message):
            load(folder, top_k=wrong)


def test_scaled_top_k_keeps_shares_and_mean() -> None:
    assert scale_top_k([8, 4, 2, 2], 2, 8) == [4, 2, 1, 1]
    assert scale_top_k([8, 4, 2, 2], 6, 8) == [8, 8, 4, 4]
    assert scale_top_k([4, 4], 1, 8) == [1, 1]


def test_auto_is_sparse_for_one_token_and_dense_for_some(tmp_path: Path) -> None:
    expected = trained()
    model = load(expected.write(tmp_path), mode="auto")
    torch.testing.assert_close(model(expected.tokens), expected.dense, rtol=1e-4, atol=1e-4)
    cache = model.new_cache(1, 16)
    logits = torch.cat([model(token, cache) for token in expected.tokens[:1].split(1, dim=1)], dim=1)
    torch.testing.assert_close(logits, expected.sparse[:1], rtol=1e-4, atol=1e-4)


def test_a_model_without_experts_runs_dense_only(tmp_path: Path) -> None:
    expected = trained()
    s = expected.settings
    folder = write_model(tmp_path, Settings(s.model, s.ssd, s.top_k, False, None), expected.tensors.items())
    torch.testing.assert_close(load(folder)(expected.tokens), expected.dense, rtol=1e-4, atol=1e-4)
    for arguments, message in (
        ({"mode": "sparse"}, "never formed any: use dense or auto"),
        ({"top_k": 2}, "no effect"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(folder, **arguments)


def test_missing_and_unused_tensors_are_errors(tmp_path: Path) -> None:
    expected = trained()
    tensors: dict[str, Any] = dict(expected.tensors)
    tensors["surplus"] = tensors.pop("head.norm.bias")
    folder = write_model(tmp_path, expected.settings, tensors.items())
    with pytest.raises(CheckpointError, match=r"missing: head\.norm\.bias; unused: surplus"):
        load(folder)
