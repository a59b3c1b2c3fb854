"""Every kind of router in use against training: whole texts, token by token, and with padding."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ssd_megatron.errors import ConfigError
from ssd_megatron.ffn.router_kinds import KINDS
from ssd_megatron.inference.load import load
from tests.saved_models import trained

SIZES = {"pkm": 16, "rand_hash": 64, "vanilla": 64}  # experts, where 8 will not do
CASES: list[dict[str, Any]] = [
    *({"router": name, "num_experts": SIZES.get(name, 8)} for name in KINDS),
    {"router": "centroid", "balance_bias": True},
    {"router": "switch", "balance_bias": True},
]


@pytest.mark.parametrize("ssd", CASES, ids=lambda ssd: f"{ssd['router']}{' with bias' * ('balance_bias' in ssd)}")
def test_logits_are_those_of_training(tmp_path: Path, ssd: dict[str, Any]) -> None:
    expected = trained(ssd=ssd)
    model = load(expected.write(tmp_path), mode="sparse")
    torch.testing.assert_close(model(expected.tokens), expected.sparse, rtol=1e-4, atol=1e-4)
    assert float((expected.dense - expected.sparse).abs().max()) > 0.1
    cache = model.new_cache(2, 16)
    parts = [model(part, cache) for part in expected.tokens.split([6, 1, 5, 1, 3], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected.sparse, rtol=1e-4, atol=1e-4)
    model.set_mode("dense")
    torch.testing.assert_close(model(expected.tokens), expected.dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("router", ["hash", "random"])
def test_padding_changes_nothing_for_routers_that_do_not_read_inputs(tmp_path: Path, router: str) -> None:
    expected = trained(ssd={"router": router, "num_experts": 8})
    model = load(expected.write(tmp_path), mode="sparse")
    tokens = torch.cat([torch.full((1, 5), 7), expected.tokens[1:, :11]], dim=1)
    logits = model(tokens, model.new_cache(1, 16, torch.tensor([5])))
    torch.testing.assert_close(logits[0, 5:], expected.sparse[1, :11], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("ssd", "mode", "message"),
    [
        ({"routing_granularity": 4}, "auto", r"cannot run this model's ssd.routing_granularity \(4\): use dense"),
        ({"router": "switch"}, "auto", r"cannot go from one mode to the other with ssd.router \(switch\)"),
    ],
)
def test_what_cannot_run_is_refused_by_name(tmp_path: Path, ssd: dict[str, Any], mode: Any, message: str) -> None:
    expected = trained(ssd=ssd)
    folder = expected.write(tmp_path)
    with pytest.raises(ConfigError, match=message):
        load(folder, mode=mode)
    torch.testing.assert_close(load(folder, mode="dense")(expected.tokens), expected.dense, rtol=1e-4, atol=1e-4)
