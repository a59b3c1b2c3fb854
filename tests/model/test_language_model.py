"""The model against its settings: sizes, initial values, equivalences."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ssd_megatron.config.model import ModelConfig
from ssd_megatron.model.cost import flops_per_token, layers_of, masked_weights, parameter_counts
from ssd_megatron.model.init import named_normal
from ssd_megatron.model.language_model import LanguageModel
from ssd_megatron.parallel.topology import Topology
from ssd_megatron.training.assembly import masked_tensors
from tests.ranks import run_ranks
from tests.small_engine import random_batch, run_config

ATTENTION_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rmsnorm, rope, no bias, untied": {
        "normalization": "rmsnorm",
        "position_embedding": "rope",
        "add_bias": False,
        "tie_embeddings": False,
    },
    "grouped queries, squared relu": {"num_attention_heads": 4, "num_query_groups": 2, "activation": "squared_relu"},
    "gated": {"activation": "reglu"},
    "gated without bias": {"activation": "swiglu", "add_bias": False},
    "gelu": {"activation": "gelu"},
    "heads of an own size, grouped, rope": {
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 12,
        "position_embedding": "rope",
    },
    "t5": {"family": "t5", "num_decoder_layers": 3, "decoder_seq_length": 8},
    "t5, gated, untied": {"family": "t5", "activation": "reglu", "tie_embeddings": False, "decoder_seq_length": 8},
    "t5 1.1": {
        "family": "t5",
        "num_attention_heads": 3,
        "kv_channels": 16,
        "activation": "geglu_tanh",
        "tie_embeddings": False,
        "decoder_seq_length": 8,
    },
    "post-norm": {"norm_position": "post"},
    "bert": {"family": "bert"},
    "bert with sentences": {"family": "bert", "num_token_types": 2, "sentence_objective": "next"},
    "pre-norm bert, gelu, untied": {
        "family": "bert",
        "norm_position": "pre",
        "activation": "gelu",
        "tie_embeddings": False,
    },
}


def losses(model: LanguageModel, batch: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(batch)["loss_mask"]
    return found


def built_sizes(topology: Topology, settings: dict[str, Any]) -> dict[str, int]:
    config = run_config(**settings)
    model = LanguageModel(config.ssd_megatron, "torch", topology)
    batch = random_batch(config, 0)
    torch.stack([part.mean() for part in model(batch).values()]).sum().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None and "router" not in n]
    assert not without, f"no gradient: {without}"
    sizes = dict.fromkeys(parameter_counts(config.ssd_megatron.model, config.ssd_megatron.ssd), 0)
    for name, parameter in model.named_parameters():
        sizes[part_of(name)] += parameter.numel()
    return sizes


def part_of(name: str) -> str:
    for part, mark in (("norm", "norm"), ("router", "router"), ("ffn", "bank"), ("attention", "attention")):
        if mark in name:
            return part
    return "embedding" if name.startswith("embedding") else "head"


@pytest.mark.parametrize("name", SETTINGS)
def test_parameter_counts_are_those_of_the_built_model(name: str) -> None:
    config = run_config(**SETTINGS[name])
    assert run_ranks(1, built_sizes, SETTINGS[name]) == [
        parameter_counts(config.ssd_megatron.model, config.ssd_megatron.ssd)
    ]


def attention_flops(query: Any, key: Any, value: Any, *_others: Any, **_options: Any) -> int:
    """What torch counts of its other kernels, from the shapes; it leaves the one for CPUs out."""
    flops: int = sdpa_flop_count(query, key, value)
    return flops


def counted_flops(topology: Topology, settings: dict[str, Any]) -> int:
    """FLOPs of the matrix products of a forward pass in dense mode, as torch counts them."""
    config = run_config(**settings)
    model = LanguageModel(config.ssd_megatron, "torch", topology).eval()
    batch = random_batch(config, 0)
    counter = FlopCounterMode(display=False, custom_mapping={ATTENTION_ON_CPU: attention_flops})
    with torch.no_grad(), counter:
        model(batch)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", SETTINGS)
def test_flops_are_those_of_the_built_model(name: str) -> None:
    config = run_config(**SETTINGS[name])
    section = config.ssd_megatron
    samples = len(random_batch(config, 0)["tokens"])
    expected = flops_per_token(section.model, section.ssd).dense / 3 * section.model.sample_tokens * samples
    if section.model.predicts_sentences:  # of one token a sample, and so left out
        expected += samples * 2 * 32 * (32 + 2)
    assert run_ranks(1, counted_flops, SETTINGS[name]) == [pytest.approx(expected)]


def test_flops_of_gpt2_small_are_the_published_estimate() -> None:
    """6 N per token for the matrices, 12 layers * 12 h s for attention (Kaplan et al., arXiv 2001.08361)."""
    model = ModelConfig(num_layers=12, hidden_size=768, num_attention_heads=12, seq_length=1024, vocab_size=50257)
    config = run_config()
    ssd = config.ssd_megatron.ssd
    matrices = 12 * (4 * 768**2 + 8 * 768**2) + 768 * 50304
    assert flops_per_token(model, ssd).dense == pytest.approx(6 * matrices + 12 * 12 * 768 * 1024)
    ffn = 6 * 12 * 8 * 768**2
    saved = ffn * (1 - ssd.top_k / ssd.num_experts) - 6 * 12 * 768 * ssd.num_experts
    assert flops_per_token(model, ssd).dense - flops_per_token(model, ssd).sparse == pytest.approx(saved)


def masked_sizes(topology: Topology) -> dict[str, int]:
    sizes = {}
    for name, settings in SETTINGS.items():
        config = run_config(ssd={"router": "mlp"}, **settings)  # with two matrices of its own
        parameters = LanguageModel(config.ssd_megatron, "torch", topology).logical_parameters()
        sizes[name] = sum(parameters[masked].numel() for masked in masked_tensors(parameters))
    return sizes


def test_masks_cover_the_matrices_of_attention_and_networks() -> None:
    models = {name: run_config(**settings).ssd_megatron.model for name, settings in SETTINGS.items()}
    expected = {
        name: sum(sum(masked_weights(model, layer)) for layer in layers_of(model)) for name, model in models.items()
    }
    assert run_ranks(1, masked_sizes) == [expected]
    assert expected["plain"] == 2 * (4 * 32 * 32 + 2 * 32 * 64)


def test_masked_weights_cost_nothing() -> None:
    """6 FLOPs a token for each live weight of attention and feed-forward networks; what remains is dense."""
    model = ModelConfig(num_layers=12, hidden_size=768, num_attention_heads=12, seq_length=1024, vocab_size=50257)
    ssd = run_config().ssd_megatron.ssd
    weights = 12 * (4 * 768**2 + 8 * 768**2)
    dense = flops_per_token(model, ssd).dense
    assert flops_per_token(model, ssd, live=0.1).dense == pytest.approx(dense - 6 * 0.9 * weights)


def first_values(topology: Topology, layers: int) -> dict[str, float]:
    torch.manual_seed(layers)  # must not matter
    model = LanguageModel(run_config(num_layers=layers).ssd_megatron, "torch", topology)
    return {name: float(p.double().pow(2).sum()) for name, p in model.named_parameters() if "linear_proj" not in name}


def test_initial_values_depend_on_name_and_seed_alone() -> None:
    two, three = run_ranks(1, first_values, 2)[0], run_ranks(1, first_values, 3)[0]
    common = [name for name in two if not name.endswith("w_out")]  # scaled by the number of layers
    assert len(common) > 20 and all(two[name] == three[name] for name in common)
    assert not torch.equal(named_normal("a", (4,), 1), named_normal("b", (4,), 1))
    assert not torch.equal(named_normal("a", (4,), 1), named_normal("a", (4,), 2))


def recomputed_gradients(topology: Topology, mode: str) -> float:
    """Largest difference of any gradient with and without recomputation, in one mode."""
    gradients = []
    for recompute in ("none", "full"):
        config = run_config()
        section = config.ssd_megatron
        training = section.training.model_copy(update={"recompute": recompute})
        model = LanguageModel(section.model_copy(update={"training": training}), "torch", topology)
        for index, ffn in enumerate(model.ffns.values()):
            ffn.mode = "sparse" if mode == "sparse" else "dense"
            ffn.router.weight.data = named_normal(str(index), ffn.router.weight.shape, 5)
        losses(model, random_batch(config, 1)).mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    return max(float((a - b).abs().max()) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_recomputation_changes_no_gradient(mode: str) -> None:
    assert run_ranks(1, recomputed_gradients, mode) == [0.0]


def future_leaks(topology: Topology) -> list[float]:
    """Change of the losses of earlier tokens when the last token changes, for learned positions and RoPE."""
    changes = []
    for position in ("learned", "rope"):
        config = run_config(position_embedding=position)
        model = LanguageModel(config.ssd_megatron, "torch", topology).eval()
        batch = random_batch(config, 2)
        before = losses(model, batch)
        batch["tokens"][:, -1] = (batch["tokens"][:, -1] + 1) % 512
        after = losses(model, batch)
        changes += [float((after - before)[:, :-1].abs().max()), float((after - before)[:, -1].abs().min())]
    return changes


def test_no_token_sees_the_future() -> None:
    learned_past, learned_last, rope_past, rope_last = run_ranks(1, future_leaks)[0]
    assert learned_past == rope_past == 0.0
    assert learned_last > 0 and rope_last > 0
