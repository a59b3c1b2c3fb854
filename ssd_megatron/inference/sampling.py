"""The choice of the next token from its logits: pure functions. Shapes: b batch, v vocabulary."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ssd_megatron.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: the likeliest one, or at random from what temperature, top_k and top_p leave.

    Attributes:
        greedy: always the likeliest token.
        temperature: logits are divided by it; below 1 likely tokens become likelier.
        top_k: only so many likeliest tokens; None: all.
        top_p: only the likeliest tokens that have this probability together; 1: all.
        repetition_penalty: above 1 makes tokens that the text has already less likely (CTRL, arXiv 1909.05858).
        seed: of the random choices; the same seed gives the same text.

    Raises:
        ConfigError: a value is out of range, or has no effect with the others.
    """

    greedy: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigError(f"temperature ({self.temperature:g}) must be above 0: for the likeliest token use greedy")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k of sampling ({self.top_k}) must be at least 1")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p ({self.top_p:g}) must be above 0 and at most 1")
        if not self.repetition_penalty > 0:
            raise ConfigError(f"repetition_penalty ({self.repetition_penalty:g}) must be above 0: 1 changes nothing")
        if self.greedy:
            for name, value, without in (
                ("temperature", self.temperature, 1.0),
                ("top_k of sampling", self.top_k, None),
                ("top_p", self.top_p, 1.0),
            ):
                if value != without:
                    raise ConfigError(f"{name} ({value}) has no effect with greedy: leave one of them out")


def choose(logits_bv: Tensor, seen_bv: Tensor | None, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Next tokens, int64 [b].

    Args:
        logits_bv: fp32.
        seen_bv: bool, tokens that each text has; needed with a repetition penalty.
    """
    if sampling.repetition_penalty != 1:
        assert seen_bv is not None
        logits_bv = penalize(logits_bv, seen_bv, sampling.repetition_penalty)
    if sampling.greedy:
        return logits_bv.argmax(dim=-1)
    logits_bv = logits_bv / sampling.temperature
    if sampling.top_k is not None:
        logits_bv = keep_top_k(logits_bv, sampling.top_k)
    if sampling.top_p < 1:
        logits_bv = keep_top_p(logits_bv, sampling.top_p)
    return torch.multinomial(logits_bv.softmax(dim=-1), 1, generator=generator).squeeze(1)


def penalize(logits_bv: Tensor, seen_bv: Tensor, penalty: float) -> Tensor:
    """Positive logits of seen tokens divided by the penalty, negative ones multiplied (CTRL, arXiv 1909.05858)."""
    return torch.where(seen_bv, torch.where(logits_bv > 0, logits_bv / penalty, logits_bv * penalty), logits_bv)


def keep_top_k(logits_bv: Tensor, top_k: int) -> Tensor:
    """-inf for all but the `top_k` largest; ties with the last of them stay too."""
    least_b1 = logits_bv.topk(min(top_k, logits_bv.size(-1)), dim=-1).values[:, -1:]
    return logits_bv.masked_fill(logits_bv < least_b1, -torch.inf)


def keep_top_p(logits_bv: Tensor, top_p: float) -> Tensor:
    """-inf for all but the fewest likeliest tokens with probability `top_p` together (arXiv 1904.09751)."""
    sorted_bv, order_bv = logits_bv.sort(dim=-1, descending=True)
    p_bv = sorted_bv.softmax(dim=-1)
    before_bv = p_bv.cumsum(dim=-1) - p_bv  # the likeliest has nothing before it, and always stays
    return logits_bv.masked_fill((before_bv >= top_p).scatter(1, order_bv, before_bv >= top_p), -torch.inf)
