"""Gives the networks of a dense model experts and routers, in place."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ssd_megatron.config.schema import SSDConfig
from ssd_megatron.ffn.routers import Router as RouterModule
from ssd_megatron.ffn.switchable import Mode, SwitchableFFN
from ssd_megatron.moefication.layers import LayerExperts, Router
from ssd_megatron.switching.partition import partition_order

# What the project calls them: similarity is the distance to an expert's mean normalised row, as in SSD.
KINDS: dict[Router, str] = {"mlp": "mlp", "similarity": "centroid", "oracle": "oracle", "random": "random"}


def ssd_settings(before: SSDConfig, router: Router, num_experts: int, top_k: int) -> SSDConfig:
    """Settings of a model with these experts."""
    changed = {"num_experts": num_experts, "top_k": top_k, "router": KINDS[router], "router_update": "frozen"}
    return SSDConfig.model_validate(before.model_dump() | changed | {"balance_bias": False, "routing_granularity": 1})


@torch.no_grad()
def form_experts(ffn: SwitchableFFN, labels: Tensor, num_experts: int) -> None:
    """Group the neurons, whatever their order is now, and set no router yet.

    Args:
        labels: expert of each neuron by identity, [N] int64.
    """
    bank = ffn.bank
    order = partition_order(labels[bank.neuron_ids.cpu()], num_experts).to(bank.neuron_ids.device)
    for parameter in bank.neuron_parameters().values():
        parameter.copy_(parameter[order])
    bank.neuron_ids.copy_(bank.neuron_ids[order])
    ffn.settings = replace(ffn.settings, num_experts=num_experts, routing_granularity=1)


@torch.no_grad()
def set_router(ffn: SwitchableFFN, router: Router, weights: Mapping[str, Tensor], top_k: int) -> None:
    """Give a network whose neurons are grouped a router with these weights."""
    like = ffn.bank.w_in
    module = RouterModule(
        ffn.settings.hidden_size,
        ffn.settings.num_experts,
        top_k,
        "frozen",
        kind=KINDS[router],
        salt=ffn.settings.hash_salt,
        dtype=like.dtype,
        device=like.device,
    )
    for name, parameter in module.named_parameters():
        parameter.copy_(weights[name])
    ffn.router = module


def use(ffns: Mapping[str, SwitchableFFN], layers: Sequence[LayerExperts], router: Router) -> None:
    """Experts and routers of all networks; a token computes one, until set_top_k says more."""
    for ffn, layer in zip(ffns.values(), layers, strict=True):
        form_experts(ffn, layer.labels, int(layer.labels.max()) + 1)
        set_router(ffn, router, layer.weights.get(router, {}), top_k=1)


def set_top_k(ffns: Mapping[str, SwitchableFFN], top_k: Sequence[int]) -> None:
    """So many experts by layer."""
    for ffn, number in zip(ffns.values(), top_k, strict=True):
        ffn.router.top_k = number


def set_mode(ffns: Mapping[str, SwitchableFFN], mode: Mode) -> None:
    for ffn in ffns.values():
        ffn.mode = mode
