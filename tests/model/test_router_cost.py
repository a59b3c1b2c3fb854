import pytest

from ssd_megatron.config.model import ModelConfig
from ssd_megatron.config.schema import SSDConfig
from ssd_megatron.ffn.router_kinds import KINDS
from ssd_megatron.ffn.routers import Router
from ssd_megatron.model.cost import Layer, flops_per_token, forward_flops, parameter_counts

MODEL = ModelConfig(num_layers=2, hidden_size=8, num_attention_heads=2, seq_length=16, vocab_size=64)


@pytest.mark.parametrize("balance_bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_those_of_the_router(kind: str, balance_bias: bool) -> None:
    if balance_bias and kind not in ("centroid", "switch"):
        pytest.skip("has no bias")
    ssd = SSDConfig(router=kind, num_experts=16, top_k=4, balance_bias=balance_bias)
    router = Router(8, 16, 4, "straight_through", kind=kind, balance_bias=balance_bias)
    assert parameter_counts(MODEL, ssd)["router"] == 2 * sum(p.numel() for p in router.parameters())
    assert (ssd.straight_through, ssd.router_learns) == (router.straight_through, router.learns)


def test_flops_of_choosing_are_those_of_the_products_it_takes() -> None:
    flops = {kind: forward_flops(MODEL, SSDConfig(router=kind, num_experts=16), Layer(16)).router for kind in KINDS}
    by_row, by_neuron = 2 * 8 * 16, 2 * 8 * 32
    assert flops["centroid"] == flops["switch"] == flops["avg_k"] == by_row
    assert flops["vanilla"] == flops["oracle"] == by_neuron
    assert flops["pkm"] == by_row / 2 and flops["mlp"] == by_row + 2 * 16 * 16
    assert flops["hash"] == flops["rand_hash"] == flops["random"] == 0
    old_name = SSDConfig(router_update="avg_k")
    assert old_name.router_kind == "avg_k" and parameter_counts(MODEL, old_name)["router"] == 0


@pytest.mark.parametrize(
    ("router", "router_update", "passes"),
    [
        *((kind, "straight_through", 3 if kind in ("centroid", "switch", "pkm") else 1) for kind in KINDS),
        ("centroid", "frozen", 1),
        ("centroid", "avg_k", 1),
    ],
)
def test_routers_that_learn_nothing_have_no_backward(router: str, router_update: str, passes: int) -> None:
    ssd = SSDConfig(router=router, router_update=router_update, num_experts=16, top_k=4)
    without = flops_per_token(MODEL, SSDConfig(router="hash", num_experts=16, top_k=4)).sparse
    forward = MODEL.num_layers * forward_flops(MODEL, ssd, Layer(16)).router
    assert flops_per_token(MODEL, ssd).sparse - without == pytest.approx(passes * forward)


def test_tiles_are_chosen_for_once() -> None:
    each, shared = (SSDConfig(routing_granularity=tokens) for tokens in (1, 8))
    assert forward_flops(MODEL, each, Layer(16)).router == 8 * forward_flops(MODEL, shared, Layer(16)).router
    saved = flops_per_token(MODEL, each).sparse - flops_per_token(MODEL, shared).sparse
    assert saved == pytest.approx(3 * 2 * 7 / 8 * forward_flops(MODEL, each, Layer(16)).router)
