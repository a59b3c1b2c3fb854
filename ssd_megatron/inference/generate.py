"""Tokens after prompts, one step at a time for a batch of texts. Shapes: b batch, s sequence, v vocabulary."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ssd_megatron.config.model import ModelConfig
from ssd_megatron.errors import ConfigError
from ssd_megatron.inference.cache import pad_in_front
from ssd_megatron.inference.sampling import Sampling, choose
from ssd_megatron.inference.steps import Continues, steps_of


def generate(
    model: Continues,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    max_new_tokens: int,
    *,
    eod: int | None = None,
    vocab_size: int | None = None,
    ended: set[int] | None = None,
) -> Iterator[list[int | None]]:
    """The next token of each text, step by step; None for a text that has ended.

    Args:
        prompts: token ids, at least one of each text.
        max_new_tokens: most tokens of each text.
        eod: the token that ends a text; it is yielded, too.
        vocab_size: token ids from here on are never chosen; the model's without it.
        ended: numbers of texts that need no further tokens, to which the caller may add between steps.
    Raises:
        ConfigError: the texts would be longer than the model's learned positions, or there is nothing to do.
    """
    check_lengths(model.config, [len(prompt) for prompt in prompts], max_new_tokens)
    ended = set() if ended is None else ended
    tokens_bs, padding_b = pad_in_front(prompts, model.device)
    seen_bv = _seen(prompts, model) if sampling.repetition_penalty != 1 else None
    generator = torch.Generator(model.device).manual_seed(sampling.seed)
    vocab_size = vocab_size or model.config.vocab_size
    with steps_of(model, tokens_bs, padding_b, max_new_tokens) as step:
        for _ in range(max_new_tokens):
            logits_bv = step(tokens_bs)[:, 0, :vocab_size]
            chosen_b = choose(logits_bv, None if seen_bv is None else seen_bv[:, :vocab_size], sampling, generator)
            if seen_bv is not None:
                seen_bv.scatter_(1, chosen_b[:, None], True)
            tokens = chosen_b.tolist()
            yield [None if text in ended else token for text, token in enumerate(tokens)]
            ended.update(text for text, token in enumerate(tokens) if token == eod)
            if len(ended) == len(prompts):
                return
            tokens_bs = chosen_b[:, None]


def room_after(config: ModelConfig, prompt_length: int) -> int | None:
    """New tokens for which a model's learned positions have room; None: it has none of these."""
    return config.seq_length - prompt_length if config.position_embedding == "learned" else None


def check_lengths(config: ModelConfig, prompt_lengths: Sequence[int], max_new_tokens: int) -> None:
    """Raises ConfigError if a model cannot continue such prompts by so many tokens."""
    if not prompt_lengths or min(prompt_lengths) == 0:
        raise ConfigError("there must be a prompt, of at least one token")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens ({max_new_tokens}) must be at least 1")
    longest = max(prompt_lengths)
    room = room_after(config, longest)
    if room is not None and max_new_tokens > room:
        remedy = f"at most {room}" if room > 0 else "a shorter prompt"
        raise ConfigError(
            f"max_new_tokens ({max_new_tokens}) after a prompt of {longest} tokens exceeds the model's "
            f"{config.seq_length} learned positions: use {remedy}"
        )


def _seen(prompts: Sequence[Sequence[int]], model: Continues) -> Tensor:
    """Tokens that each text has, bool [b, v]."""
    seen_bv = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool, device=model.device)
    for text, prompt in enumerate(prompts):
        seen_bv[text, list(prompt)] = True
    return seen_bv
