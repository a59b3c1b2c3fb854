"""Other dense trainers of the same size, each as one function that does an optimizer step.

- the same GPT of ours under the same engine, with two plain linear layers for the feed-forward network;
- Hugging Face's OPT and GPT-2 with torch's fused AdamW, eager and compiled, in mixed precision where ours is bf16.
"""

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.row import Missing
from ssd_megatron.config.load import RunConfig
from ssd_megatron.ffn.bank import NeuronBank
from ssd_megatron.model.blocks import TransformerBlock
from ssd_megatron.model.language_model import LanguageModel
from ssd_megatron.parallel.topology import Topology
from ssd_megatron.training.assembly import make_engine
from ssd_megatron.training.synthetic import SyntheticJob, step_batches

FAMILIES = {"opt": "Hugging Face OPT", "gpt2": "Hugging Face GPT-2"}


@dataclass
class Reference:
    """A trainer. `step(turn)` does an optimizer step and returns its loss; any integer is a turn."""

    name: str
    parameters: int
    step: Callable[[int], float]


class PlainFFN(nn.Module):
    """act(x w_in^T) w_out^T under autograd, as megatron-core's `mlp` submodule; takes its values from a bank."""

    def __init__(self, bank: NeuronBank) -> None:
        super().__init__()
        assert not bank.activation.gated and bank.activation.name == "relu", bank.activation.name
        neurons, hidden = bank.w_in.shape
        self.up = nn.Linear(hidden, neurons, bias=bank.b_in is not None)
        self.down = nn.Linear(neurons, hidden, bias=bank.b_out is not None)
        with torch.no_grad():
            self.up.weight.copy_(bank.w_in)
            self.down.weight.copy_(bank.w_out.t())
            for mine, theirs in ((self.up.bias, bank.b_in), (self.down.bias, bank.b_out)):
                if theirs is not None:
                    mine.copy_(theirs)

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return F.linear(F.relu(self.up(x)), self.down.weight), self.down.bias


def plain_model(config: RunConfig, topology: Topology) -> LanguageModel:
    """Our GPT as it starts, its switchable networks replaced."""
    model = LanguageModel(config.ssd_megatron, "torch", topology)
    for block in model.blocks.values():
        assert isinstance(block, TransformerBlock)
        block.layer.mlp = PlainFFN(block.ffn.bank)
    return model


def plain_step(config: RunConfig, job: SyntheticJob) -> Reference:
    model = plain_model(config, job.topology)
    parameters = sum(p.numel() for p in model.parameters())
    engine = make_engine(model, config, job.topology)

    def step(turn: int) -> float:
        return engine.train_step(step_batches(config, job.topology, turn + 1)).loss

    return Reference("the same with a plain network", parameters, step)


def hugging_face_steps(family: str, config: RunConfig, topology: Topology, compiled: bool) -> list[Reference | Missing]:
    """The trainers of one family; both run on the same parameters."""
    name = FAMILIES[family]
    try:
        model = hugging_face_model(family, config).to(topology.device)
    except ImportError as error:
        return [Missing(f"dense step / {name}", str(error))]
    parameters = sum(p.numel() for p in model.parameters())
    params = config.deepspeed["optimizer"]["params"]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=params["lr"], betas=(0.9, 0.95), weight_decay=params["weight_decay"], fused=True
    )

    def trainer(forward: Callable[..., Any]) -> Callable[[int], float]:
        def step(turn: int) -> float:
            batches = step_batches(config, topology, turn + 1)
            total = torch.zeros((), device=topology.device)
            for batch in batches:
                with _mixed_precision(config, topology.device):
                    loss = forward(input_ids=batch["tokens"], labels=batch["tokens"], use_cache=False).loss
                (loss / len(batches)).backward()
                total += loss.detach() / len(batches)
            nn.utils.clip_grad_norm_(model.parameters(), config.deepspeed["gradient_clipping"])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return float(total)

        return step

    found: list[Reference | Missing] = [Reference(name, parameters, trainer(model))]
    if not compiled:
        return found
    if shutil.which("g++") is None:
        return [*found, Missing(f"dense step / {name}, compiled", "torch.compile needs a C++ compiler (g++)")]
    faster = trainer(torch.compile(model))
    try:
        faster(0)
    except RuntimeError as error:  # what torch.compile raises for a program that it cannot compile
        reason = str(error).strip().splitlines()[0]
        return [*found, Missing(f"dense step / {name}, compiled", f"torch.compile: {reason}")]
    return [*found, Reference(f"{name}, compiled", parameters, faster)]


def hugging_face_model(family: str, config: RunConfig) -> nn.Module:
    """The sizes of ours: positions, biases, ReLU and tied embeddings included.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import AutoModelForCausalLM, GPT2Config, OPTConfig

    m = config.ssd_megatron.model
    settings: OPTConfig | GPT2Config
    if family == "opt":
        settings = OPTConfig(
            vocab_size=m.padded_vocab_size,
            hidden_size=m.hidden_size,
            num_hidden_layers=m.num_layers,
            ffn_dim=m.ffn_hidden_size,
            max_position_embeddings=m.seq_length,
            num_attention_heads=m.num_attention_heads,
            activation_function="relu",
            dropout=0.0,
        )
    else:
        settings = GPT2Config(
            vocab_size=m.padded_vocab_size,
            n_positions=m.seq_length,
            n_embd=m.hidden_size,
            n_layer=m.num_layers,
            n_head=m.num_attention_heads,
            n_inner=m.ffn_hidden_size,
            activation_function="relu",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    model: nn.Module = AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa")
    return model.train()


def _mixed_precision(config: RunConfig, device: torch.device) -> AbstractContextManager[object]:
    return nullcontext() if config.dtype == "float32" else torch.autocast(device.type, getattr(torch, config.dtype))
