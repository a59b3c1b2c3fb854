"""Speed of a trained model in use on a CPU: tokens one at a time, dense and sparse, beside transformers on the same
weights; the feed-forward networks alone; a long prompt.

    python -m benchmarks.inference [--quick] [--json FILE] [--threads N]

The variants take turns in one process, and a row is the median of the turns' ratios. Weights are random: half of the
ReLU neurons fire, of a trained model far fewer, which makes both of our modes faster than here.
"""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM

from benchmarks.row import Row
from benchmarks.table import parser_for, report
from benchmarks.timing import paired, take_turns
from ssd_megatron.config.schema import ModelConfig, SSDConfig
from ssd_megatron.export import opt
from ssd_megatron.ffn.kernels import choose_backend
from ssd_megatron.ffn.routers import router_weights_from_bank
from ssd_megatron.inference.ffn import Experts, Mode
from ssd_megatron.inference.generate import generate
from ssd_megatron.inference.model import CausalModel
from ssd_megatron.inference.place import Place
from ssd_megatron.inference.sampling import Sampling
from ssd_megatron.model.cost import Layer, ffn_matrices, forward_flops, parameter_counts

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
FFN_GOAL = {torch.float32: 0.32, torch.bfloat16: 0.40}
EXPERTS = 16
SHARES = {0.25: 1.8, 0.125: 2.2}  # of the experts that a token computes, and the goal for the whole model's speed
PROMPT = [1, 2, 3, 4]


@dataclass(frozen=True)
class Size:
    """What is measured: a model for decoding, tokens of one turn, and layers and tokens of a long prompt."""

    model: ModelConfig
    new_tokens: int
    prompt_layers: int
    prompt_tokens: int
    turns: int

    def __str__(self) -> str:
        m = self.model
        return f"h {m.hidden_size}, d_ff {m.ffn_hidden_size}, {m.num_layers} layers"


def shape(hidden: int, layers: int, positions: int) -> ModelConfig:
    """A small vocabulary, so that the head does not hide the layers."""
    return ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=hidden // 128,
        ffn_hidden_size=4 * hidden,
        seq_length=positions,
        vocab_size=8192,
        activation="relu",
    )


FULL = Size(shape(2048, 8, 4096), new_tokens=48, prompt_layers=2, prompt_tokens=4096, turns=5)
QUICK = Size(shape(512, 4, 1024), new_tokens=8, prompt_layers=2, prompt_tokens=1024, turns=5)


@torch.no_grad()
def build(config: ModelConfig, dtype: torch.dtype) -> CausalModel:
    torch.manual_seed(0)
    backend, _ = choose_backend(
        "auto", torch.device("cpu"), dtype, (config.ffn_hidden_size // EXPERTS, config.hidden_size)
    )
    experts = Experts(EXPERTS, "centroid", "straight_through", balance_bias=False, backend=backend)
    model = CausalModel(config, experts, Place(dtype, torch.device("cpu")))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=config.hidden_size**-0.5)
        elif "norm.weight" not in name:
            parameter.zero_()
    for ffn in model.ffns:
        assert ffn.router is not None
        ffn.router.weight.copy_(router_weights_from_bank(ffn.bank.rows(), EXPERTS))
    return model


def in_transformers(model: CausalModel) -> OPTForCausalLM:
    tensors = {name: t for name, t in model.logical_parameters().items() if ".router." not in name}
    theirs = OPTForCausalLM(OPTConfig(**opt.config_of(model.config))).to(model.place.dtype)
    theirs.load_state_dict(opt.to_hf(tensors, model.config), strict=False)
    theirs.tie_weights()
    return theirs.eval()


def set_mode(model: CausalModel, mode: Mode, share: float) -> None:
    model.set_mode(mode)
    for ffn in model.ffns:
        ffn.top_k = max(1, round(share * EXPERTS))


def decoding(model: CausalModel, mode: Mode, share: float, tokens: int) -> Callable[[int], object]:
    def run(_turn: int) -> object:
        set_mode(model, mode, share)
        return list(generate(model, [PROMPT], Sampling(greedy=True), tokens))

    return run


def networks(model: CausalModel, mode: Mode, share: float) -> Callable[[int], object]:
    """All layers' feed-forward networks for one token."""

    def run(turn: int) -> object:
        set_mode(model, mode, share)
        x = torch.randn(1, model.config.hidden_size, generator=torch.Generator().manual_seed(turn + 100))
        x = x.to(model.place.dtype)
        return [ffn(x) for ffn in model.ffns for _ in range(2)]

    return run


def decode_rows(size: Size, dtype: torch.dtype) -> Iterator[Row]:
    model = build(size.model, dtype)
    theirs = in_transformers(model)
    name, tokens = f"{NAMES[dtype]} {size}", size.new_tokens

    def their_decoding(_turn: int) -> Tensor:
        ids = torch.tensor([PROMPT])
        generated: Tensor = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return generated

    alone = {"dense": networks(model, "dense", 1.0)}
    alone |= {f"sparse {share:g}": networks(model, "sparse", share) for share in SHARES}
    times = take_turns(alone, 3 * size.turns)
    for share in SHARES:
        goal = FFN_GOAL[dtype] if share == 0.25 else FFN_GOAL[dtype] / 2
        ratio = paired(times[f"sparse {share:g}"], times["dense"])
        layer_ms = min(times["dense"]) / 2 / size.model.num_layers * 1e3
        details = {"dense ms a layer": layer_ms}
        yield Row(f"{name}: networks, one token, sparse {share:g} / dense", ratio, goal, share, details=details)

    variants = {"transformers": their_decoding, "dense": decoding(model, "dense", 1.0, tokens)}
    variants |= {f"sparse {share:g}": decoding(model, "sparse", share, tokens) for share in SHARES}
    times = take_turns(variants, size.turns, warm_up=1)
    rates = {f"{variant} tokens/s": tokens / min(seconds) for variant, seconds in times.items()}
    yield Row(
        f"{name}: dense / transformers, speed", paired(times["transformers"], times["dense"]), 1.0, 1.0, True, rates
    )
    for share, goal in SHARES.items():
        seconds = times[f"sparse {share:g}"]
        beside = {"times transformers": paired(times["transformers"], seconds)}
        bound = weights_read(size.model, 1.0) / weights_read(size.model, share)
        yield Row(
            f"{name}: sparse {share:g} / dense, speed", paired(times["dense"], seconds), goal, bound, True, beside
        )


def weights_read(model: ModelConfig, share: float) -> float:
    """Weights that one token reads, all but the embedding's row; of the networks a share, of dense output weights and
    of sparse ones the half whose neurons fire."""
    parts = parameter_counts(model, SSDConfig(num_experts=EXPERTS))
    matrices = ffn_matrices(model)
    networks_read = parts["ffn"] * share * (matrices - 0.5) / matrices
    head = model.padded_vocab_size * model.hidden_size
    return parts["attention"] + networks_read + head + (parts["router"] if share < 1 else 0)


def prompt_row(size: Size, dtype: torch.dtype) -> Row:
    config = size.model.model_copy(update={"num_layers": size.prompt_layers})
    model = build(config, dtype)
    prompt = torch.randint(0, config.vocab_size, (1, size.prompt_tokens))

    def reading(mode: Mode) -> Callable[[int], object]:
        def run(_turn: int) -> object:
            set_mode(model, mode, 0.25)
            return model(prompt, last_only=True)

        return run

    times = take_turns({"dense": reading("dense"), "sparse": reading("sparse")}, max(3, size.turns // 2), warm_up=1)
    rates = {f"{mode} tokens/s": size.prompt_tokens / min(seconds) for mode, seconds in times.items()}
    name = f"{NAMES[dtype]} h {config.hidden_size}, {config.num_layers} layers, prompt of {size.prompt_tokens} tokens"
    flops = forward_flops(config, SSDConfig(num_experts=EXPERTS), Layer(size.prompt_tokens))
    bound = (flops.attention + flops.ffn) / (flops.attention + flops.ffn / 4 + flops.router)
    return Row(f"{name}: sparse 0.25 / dense, speed", paired(times["dense"], times["sparse"]), 1.4, bound, True, rates)


def rows(size: Size) -> Iterator[Row]:
    for dtype in NAMES:
        yield from decode_rows(size, dtype)
        gc.collect()
        yield prompt_row(size, dtype)


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report("inference", rows(QUICK if args.quick else FULL), args.json)


if __name__ == "__main__":
    main()
