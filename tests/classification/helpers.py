"""A tiny task, a tokenizer for it, and models of all families with random weights and experts, as checkpoints."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ssd_megatron.data.tokenizers import train_sentencepiece
from ssd_megatron.ffn.routers import expert_directions
from ssd_megatron.model.init import named_normal
from ssd_megatron.model.language_model import LanguageModel
from ssd_megatron.parallel.topology import Topology
from ssd_megatron.seeding import generator_for
from ssd_megatron.training.saved_model import Settings, write_model
from tests.small_engine import run_config

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt": {},
    "gpt, rope": {"position_embedding": "rope", "normalization": "rmsnorm"},
    "bert": {"family": "bert"},
    "bert with sentences": {"family": "bert", "num_token_types": 2, "sentence_objective": "next"},
    "t5": {"family": "t5", "decoder_seq_length": 8},
}
THINGS = ("stone", "river", "cloud", "house", "road", "tree", "lamp", "boat")
WORDS = {"bright": ("shining", "glowing", "gleaming"), "dark": ("dim", "gloomy", "shadowy")}
TOP_K = 2


def sentences(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Texts of various lengths, and their labels: which kind of word is in them."""
    generator = random.Random(seed)
    found = []
    for number in range(count):
        label = list(WORDS)[number % 2]
        words = generator.choices(THINGS, k=generator.randrange(2, 6))
        words.insert(generator.randrange(len(words)), generator.choice(WORDS[label]))
        found.append((" ".join(words), label))
    return found


def write_task(path: Path, count: int, seed: int = 0) -> Path:
    lines = ["sentence\tlabel", *("\t".join(row) for row in sentences(count, seed))]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_tokenizer(path: Path) -> Path:
    train_sentencepiece((text for text, _ in sentences(300)), path, 300, reserve=("bert",))
    return path


def write_random_model(
    topology: Topology,
    root: Path,
    tokenizer: Path,
    model: Mapping[str, Any],
    ssd: Mapping[str, Any] | None = None,
    has_experts: bool = True,
) -> Path:
    """A checkpoint whose neurons lie in an order of their own, with the routers of a switch."""
    section = run_config(**{"seq_length": 24, **model}).ssd_megatron
    section = section.model_copy(update={"ssd": section.ssd.model_copy(update={"top_k": TOP_K, **(ssd or {})})})
    language_model = LanguageModel(section, "torch", topology)
    parameters = language_model.logical_parameters()
    neuron_ids = {}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.add_(named_normal(f"noise {name}", tuple(parameter.shape), 0), alpha=0.1)
        for name, ffn in language_model.ffns.items():
            ids = torch.randperm(len(ffn.bank.neuron_ids), generator=generator_for(name))
            neuron_ids[name] = ids
            ffn.bank.neuron_ids.copy_(ids)
            experts = ffn.settings.num_experts
            directions_EH, norms_F = expert_directions(ffn.bank.rows(), experts)
            if ffn.router.kind.by_identity:
                directions_EH = directions_EH[ffn.bank.expert_numbers(experts).argsort()]
            for leaf, value in ffn.router.initial_values(directions_EH, norms_F).items():
                parameters[f"{name}.router.{leaf}"].copy_(value)
    settings = Settings(section.model, section.ssd, [section.ssd.top_k] * len(neuron_ids), has_experts, tokenizer)
    return write_model(root, settings, ((name, p.detach()) for name, p in parameters.items()), neuron_ids)
