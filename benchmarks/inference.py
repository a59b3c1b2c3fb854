"""Speed of a trained model in use: tokens one at a time, dense and sparse, beside transformers on the same weights; the
feed-forward networks alone; a long prompt. On a GPU, if there is one, in bf16 and with CUDA graphs.

    python -m benchmarks.inference [--quick] [--json FILE] [--threads N]

The variants take turns in one process, and a row is the median of the turns' ratios. Weights are random: half of the
ReLU neurons fire, of a trained model far fewer, which makes our modes faster than here (on a GPU the sparse one).
"""

import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.row import Missing, Row
from benchmarks.table import parser_for, report
from benchmarks.timing import paired, take_turns
from ssd_megatron.config.model import ModelConfig
from ssd_megatron.config.schema import SSDConfig
from ssd_megatron.export import opt
from ssd_megatron.ffn.kernels import choose_backend
from ssd_megatron.ffn.kernels.trial import router_backend
from ssd_megatron.ffn.routers import router_weights_from_bank
from ssd_megatron.inference.ffn import Experts, Mode
from ssd_megatron.inference.generate import generate
from ssd_megatron.inference.load import MODELS
from ssd_megatron.inference.model import CausalModel, Model
from ssd_megatron.inference.place import Place
from ssd_megatron.inference.sampling import Sampling
from ssd_megatron.inference.steps import GraphCapture
from ssd_megatron.model.cost import Layer, ffn_matrices, forward_flops, parameter_counts
from ssd_megatron.parallel.device import IS_CUDA, local_device

DEVICE = local_device()
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
FFN_GOAL = {torch.float32: 0.32, torch.bfloat16: 0.40}
# Of the experts that a token computes, and the goal for the whole model's speed.
SHARES = {0.25: 1.6, 0.125: 1.9} if IS_CUDA else {0.25: 1.8, 0.125: 2.2}
PROMPT = [1, 2, 3, 4]


@dataclass(frozen=True)
class Size:
    """What is measured: a model for decoding, tokens of one turn, layers and tokens of a long prompt, and passes
    through the networks when they are timed alone."""

    model: ModelConfig
    new_tokens: int
    prompt_layers: int
    prompt_tokens: int
    turns: int
    experts: int = 16
    passes: int = 2

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
FULL_GPU = Size(
    shape(4096, 8, 4096), new_tokens=96, prompt_layers=2, prompt_tokens=4096, turns=9, experts=32, passes=10
)
QUICK = Size(shape(512, 4, 1024), new_tokens=8, prompt_layers=2, prompt_tokens=1024, turns=5)


@torch.no_grad()
def build(config: ModelConfig, dtype: torch.dtype, experts: int) -> Model:
    torch.manual_seed(0)
    backend, _ = choose_backend("auto", DEVICE, dtype, (config.ffn_hidden_size // experts, config.hidden_size))
    scores = router_backend(DEVICE, dtype, config.activation)
    groups = Experts(experts, "centroid", "straight_through", False, backend, scores)
    model = MODELS[config.family](config, groups, Place(dtype, DEVICE))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=config.hidden_size**-0.5)
        elif "norm.weight" not in name:
            parameter.zero_()
    for ffn in model.ffns:
        assert ffn.router is not None
        ffn.router.weight.copy_(router_weights_from_bank(ffn.bank.rows(), experts))
    return model


def in_transformers(model: Model) -> nn.Module:
    """Raises ImportError if transformers is not installed."""
    from transformers import OPTConfig, OPTForCausalLM

    tensors = {name: t for name, t in model.logical_parameters().items() if ".router." not in name}
    with DEVICE:
        theirs = OPTForCausalLM(OPTConfig(**opt.config_of(model.config))).to(model.place.dtype)
    theirs.load_state_dict(opt.to_hf(tensors, model.config), strict=False)
    theirs.tie_weights()
    found: nn.Module = theirs.eval()
    return found


def set_mode(model: Model, mode: Mode, share: float) -> None:
    model.set_mode(mode)
    for ffn in model.ffns:
        assert ffn.experts is not None
        ffn.top_k = max(1, round(share * ffn.experts.count))


def decoding(model: CausalModel, mode: Mode, share: float, tokens: int, graphs: bool = True) -> Callable[[int], object]:
    def run(_turn: int) -> object:
        set_mode(model, mode, share)
        model.graphs = graphs
        return list(generate(model, [PROMPT], Sampling(greedy=True), tokens))

    return run


def networks(model: Model, mode: Mode, share: float, passes: int) -> Callable[[int], object]:
    """All layers' feed-forward networks for one token; on a GPU in a CUDA graph, as in use."""
    x = torch.zeros(1, model.config.hidden_size, dtype=model.place.dtype, device=DEVICE)

    def compute() -> None:
        set_mode(model, mode, share)
        for ffn in model.ffns * passes:
            ffn(x)

    again = GraphCapture(DEVICE)(compute) if IS_CUDA else compute

    def run(turn: int) -> None:
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(turn + 100)))
        again()

    return run


def transformers_decoding(model: Model, tokens: int) -> Callable[[int], object]:
    theirs: Any = in_transformers(model)

    def run(_turn: int) -> Tensor:
        ids = torch.tensor([PROMPT], device=DEVICE)
        generated: Tensor = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return generated

    return run


def network_rows(model: Model, size: Size, name: str) -> Iterator[Row]:
    dtype, passes = model.place.dtype, size.passes
    alone = {"dense": networks(model, "dense", 1.0, passes)}
    alone |= {f"sparse {share:g}": networks(model, "sparse", share, passes) for share in SHARES}
    times = take_turns(alone, 3 * size.turns)
    for share in SHARES:
        goal = FFN_GOAL[dtype] if share == 0.25 else FFN_GOAL[dtype] / 2
        ratio = paired(times[f"sparse {share:g}"], times["dense"])
        layer_ms = min(times["dense"]) / passes / size.model.num_layers * 1e3
        details = {"dense ms a layer": layer_ms}
        yield Row(f"{name}: networks, one token, sparse {share:g} / dense", ratio, goal, share, details=details)


def decode_rows(size: Size, dtype: torch.dtype) -> Iterator[Row | Missing]:
    model = build(size.model, dtype, size.experts)
    assert isinstance(model, CausalModel)
    name, tokens = f"{NAMES[dtype]} {size}", size.new_tokens
    yield from network_rows(model, size, name)
    variants = {"dense": decoding(model, "dense", 1.0, tokens)}
    variants |= {f"sparse {share:g}": decoding(model, "sparse", share, tokens) for share in SHARES}
    if IS_CUDA:
        variants |= {f"{mode}, launched": decoding(model, mode, 0.25, tokens, False) for mode in ("dense", "sparse")}
    lacking = None
    try:
        variants["transformers"] = transformers_decoding(model, tokens)
    except ImportError as error:
        lacking = Missing(f"{name}: dense / transformers, speed", str(error))
    times = take_turns(variants, size.turns, warm_up=1)
    rates = {f"{variant} tokens/s": tokens / min(seconds) for variant, seconds in times.items()}
    yield lacking or Row(
        f"{name}: dense / transformers, speed", paired(times["transformers"], times["dense"]), 1.0, 1.0, True, rates
    )
    for share, goal in SHARES.items():
        seconds = times[f"sparse {share:g}"]
        beside = rates if lacking else {"times transformers": paired(times["transformers"], seconds)}
        bound = weights_read(size, 1.0) / weights_read(size, share)
        yield Row(
            f"{name}: sparse {share:g} / dense, speed", paired(times["dense"], seconds), goal, bound, True, beside
        )
    for mode, graphed in (("dense", "dense"), ("sparse", "sparse 0.25")) if IS_CUDA else ():
        gain = paired(times[f"{mode}, launched"], times[graphed])
        yield Row(f"{name}: {graphed} by a graph / launched, speed", gain, 1.0, 1.0, True)


def weights_read(size: Size, share: float) -> float:
    """Weights that one token reads, all but the embedding's row; of the networks a share, of sparse output weights and,
    on a CPU, of dense ones the half whose neurons fire."""
    model = size.model
    parts = parameter_counts(model, SSDConfig(num_experts=size.experts))
    matrices = ffn_matrices(model)
    skipped = 0.0 if IS_CUDA and share == 1 else 0.5
    networks_read = parts["ffn"] * share * (matrices - skipped) / matrices
    head = model.padded_vocab_size * model.hidden_size
    return parts["attention"] + networks_read + head + (parts["router"] if share < 1 else 0)


def prompt_row(size: Size, dtype: torch.dtype) -> Row:
    config = size.model.model_copy(update={"num_layers": size.prompt_layers})
    model = build(config, dtype, size.experts)
    prompt = torch.randint(0, config.vocab_size, (1, size.prompt_tokens), device=DEVICE)

    def reading(mode: Mode) -> Callable[[int], object]:
        def run(_turn: int) -> object:
            set_mode(model, mode, 0.25)
            return model(prompt, last_only=True)

        return run

    times = take_turns({"dense": reading("dense"), "sparse": reading("sparse")}, max(3, size.turns // 2), warm_up=1)
    rates = {f"{mode} tokens/s": size.prompt_tokens / min(seconds) for mode, seconds in times.items()}
    name = f"{NAMES[dtype]} h {config.hidden_size}, {config.num_layers} layers, prompt of {size.prompt_tokens} tokens"
    flops = forward_flops(config, SSDConfig(num_experts=size.experts), Layer(size.prompt_tokens))
    bound = (flops.attention + flops.ffn) / (flops.attention + flops.ffn / 4 + flops.router)
    return Row(f"{name}: sparse 0.25 / dense, speed", paired(times["dense"], times["sparse"]), 1.4, bound, True, rates)


def rows(size: Size) -> Iterator[Row | Missing]:
    for dtype in [torch.bfloat16] if IS_CUDA else NAMES:
        yield from decode_rows(size, dtype)
        gc.collect()
        yield prompt_row(size, dtype)


def main() -> int:
    parser = parser_for(__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    met = report("inference", rows(QUICK if args.quick else FULL_GPU if IS_CUDA else FULL), args.json)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
