"""The router that is trained, and how much of the activation routers find."""

import torch
import torch.nn.functional as F

from ssd_megatron.ffn.activations import ACTIVATIONS
from ssd_megatron.ffn.bank import NeuronTensors
from ssd_megatron.ffn.router_kinds import activation_mass, expert_scores
from ssd_megatron.ffn.routers import expert_directions
from ssd_megatron.moefication.layers import recall_by_experts
from ssd_megatron.moefication.mlp_router import train_mlp_router

TOKENS, HELD_OUT, HIDDEN, NEURONS, EXPERTS = 6000, 600, 24, 64, 8


def test_a_trained_router_finds_more_than_similarity_and_less_than_all() -> None:
    """Experts of different strength, of which their directions say nothing."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    strength = torch.logspace(-1, 1, EXPERTS).repeat_interleave(NEURONS // EXPERTS)
    w_in = torch.randn(NEURONS, HIDDEN, generator=generator) * strength[:, None]
    bank = NeuronTensors(w_in, None, None, None, torch.zeros_like(w_in))
    mass = activation_mass(x, bank, ACTIVATIONS["relu"], EXPERTS)
    directions, _ = expert_directions(w_in, EXPERTS)
    router = train_mlp_router(x, mass, HELD_OUT, directions, epochs=10, seed=1)
    seen, there = x[-HELD_OUT:], mass[-HELD_OUT:]
    recall = {
        "oracle": recall_by_experts(there, there),
        "mlp": recall_by_experts(router.scores(seen), there),
        "similarity": recall_by_experts(expert_scores(seen, directions), there),
    }
    assert bool((recall["oracle"] >= recall["mlp"] - 1e-12).all())
    assert float(recall["mlp"][1]) > float(recall["similarity"][1]) + 0.1
    again = train_mlp_router(x, mass, HELD_OUT, directions, epochs=10, seed=1)
    assert again.weight.equal(router.weight) and again.mix.equal(router.mix)


def test_recall_is_the_share_of_the_mass_in_the_first_experts() -> None:
    mass = torch.tensor([[1.0, 3.0, 0.0, 4.0], [0.0, 0.0, 0.0, 0.0], [2.0, 0.0, 2.0, 0.0]])
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]])
    found = recall_by_experts(scores, mass)
    assert found.tolist() == [(1 / 8 + 0) / 2, (4 / 8 + 2 / 4) / 2, (4 / 8 + 2 / 4) / 2, 1.0]


def test_training_starts_from_the_experts_directions() -> None:
    x = torch.randn(300, HIDDEN, generator=torch.Generator().manual_seed(2))
    directions = F.normalize(torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(3)), dim=1)
    router = train_mlp_router(x, torch.ones(300, EXPERTS), 30, directions, epochs=0, seed=0)
    assert router.weight.equal(directions) and router.mix.equal(torch.eye(EXPERTS))
