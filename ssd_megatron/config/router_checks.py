"""What a router must be to the experts and to the tokens that it chooses for."""

import math
from collections.abc import Iterator
from pathlib import Path

from ssd_megatron.config.check_list import CheckList
from ssd_megatron.config.report import problem
from ssd_megatron.config.schema import NEURON_ROUTERS, TOKEN_ROUTERS

ROUTER_CHECKS = CheckList()


@ROUTER_CHECKS("ssd.num_experts", "ssd.top_k", "ssd.router", "ssd.router_update")
def _top_k(experts: int, top_k: int, router: str, router_update: str) -> Iterator[str]:
    if top_k > experts:
        hint = max(1, experts // 4)
        yield problem("ssd.top_k", top_k, f"must be at most ssd.num_experts ({experts}): try {hint}")
    if top_k == 1 and router == "pkm":
        yield problem("ssd.top_k", top_k, 'gives ssd.router "pkm" no gradient: try 2')
    if top_k == 1 and router == "centroid" and router_update == "straight_through":
        yield problem(
            "ssd.top_k",
            top_k,
            'gives the router no gradient with ssd.router_update "straight_through": try 2, or router_update "frozen" '
            'or "avg_k"',
        )


@ROUTER_CHECKS("ssd.router", "ssd.num_experts", "model.ffn_hidden_size")
def _router_sizes(router: str, experts: int, neurons: int) -> Iterator[str]:
    if router in NEURON_ROUTERS and experts != neurons:
        yield problem(
            "ssd.router",
            router,
            f"chooses single neurons, and ssd.num_experts is {experts}: set it to model.ffn_hidden_size ({neurons})",
        )
    if router == "pkm" and math.isqrt(experts) ** 2 != experts:
        side = math.isqrt(experts)
        hint = f"{side**2} or {(side + 1) ** 2}"
        yield problem("ssd.num_experts", experts, f'must be a square with ssd.router "pkm": try {hint}')


@ROUTER_CHECKS("ssd.router", "ssd.router_update", "ssd.balance_bias")
def _balance_bias(router: str, router_update: str, balance_bias: bool) -> Iterator[str]:
    learns = router == "switch" or (router == "centroid" and router_update == "straight_through")
    if balance_bias and not learns:
        yield problem(
            "ssd.balance_bias",
            balance_bias,
            f'needs a router of one row per expert that learns, not ssd.router "{router}"'
            + f' with router_update "{router_update}"' * (router == "centroid")
            + ": use switch or a straight-through centroid, or leave it out",
        )


@ROUTER_CHECKS("ssd.router", "ssd.routing", "ssd.record_routing")
def _replayed_router(router: str, routing: str | Path, record: Path | None) -> Iterator[str]:
    for name, value in (("routing", None if routing == "live" else routing), ("record_routing", record)):
        if value is not None and router == "pkm":
            yield problem(f"ssd.{name}", value, 'cannot go with ssd.router "pkm", which learns by its own choice')


@ROUTER_CHECKS("ssd.partition", "checkpoint.start_from")
def _kept_experts(partition: str | Path, start_from: Path | None) -> Iterator[str]:
    if partition == "kept" and start_from is None:
        yield problem(
            "ssd.partition", partition, "keeps the experts of checkpoint.start_from, which is not given: give it"
        )


@ROUTER_CHECKS("ssd.router", "ssd.routing_granularity")
def _router_of_tiles(router: str, granularity: int) -> Iterator[str]:
    if granularity > 1 and router in TOKEN_ROUTERS:
        yield problem(
            "ssd.routing_granularity", granularity, f'needs a router that scores inputs, and "{router}" does not: use 1'
        )


@ROUTER_CHECKS("ssd.routing_granularity", "ssd.routing", "ssd.record_routing")
def _recorded_tiles(granularity: int, routing: str | Path, record: Path | None) -> Iterator[str]:
    for name, value in (("routing", None if routing == "live" else routing), ("record_routing", record)):
        if value is not None and granularity > 1:
            yield problem(f"ssd.{name}", value, "has experts of tokens, not of tiles: it needs routing_granularity 1")


@ROUTER_CHECKS("ssd.routing_granularity", "model.family", "model.seq_length", "model.decoder_seq_length")
def _tiles_of_sequences(granularity: int, family: str, length: int, decoder_length: int) -> Iterator[str]:
    lengths = {"seq_length": length} | ({"decoder_seq_length": decoder_length} if family == "t5" else {})
    name, shortest = min(lengths.items(), key=lambda named: named[1])
    if granularity > shortest:
        yield problem(
            "ssd.routing_granularity",
            granularity,
            f"must be at most model.{name} ({shortest}), where a sequence is one tile: try {max(1, shortest // 4)}",
        )
