"""Masked language models (BERT) in use: logits of every token, and what stands behind masks in texts.

Shapes: b batch, s sequence, v vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssd_megatron.config.model import ModelConfig
from ssd_megatron.errors import ConfigError
from ssd_megatron.inference.cache import pad_in_front, whole_view
from ssd_megatron.inference.marks import MarkedTokenizer
from ssd_megatron.inference.model import Model


class MaskedModel(Model):
    """Encoder whose every token looks at all of its text."""

    @torch.inference_mode()
    def forward(
        self, tokens_bs: Tensor, token_types_bs: Tensor | None = None, padding_b: Tensor | None = None
    ) -> Tensor:
        """Logits of every token, fp32 [b, s, v].

        Args:
            tokens_bs: int64, markers included.
            token_types_bs: all of the first kind without it.
            padding_b: so many slots at the beginning of each text hold no token; None if all are equally long.
        """
        view = self.rotated(whole_view(tokens_bs.size(1), padding_b, self.device))
        keys_T = self.router_keys(tokens_bs, view.positions_bs)
        x_bsh = self.embedding(tokens_bs, view.positions_bs, token_types_bs)
        for block in self.blocks:
            x_bsh = block(x_bsh, view, None, keys_T)
        logits_bsv: Tensor = self.head(x_bsh)
        return logits_bsv


@dataclass(frozen=True)
class Guess:
    """A token for a mask, as text, and its probability among all tokens of the tokenizer."""

    text: str
    probability: float


@dataclass(frozen=True)
class Filled:
    """A text with the likeliest token for each mask, and the likeliest few for each, best first."""

    text: str
    guesses: list[list[Guess]]


def fill(model: MaskedModel, tokenizer: MarkedTokenizer, texts: Sequence[str], number: int = 5) -> list[Filled]:
    """What the model puts in the place of each mask; each is predicted alone, the others being masks.

    Args:
        tokenizer: of the marks of `bert_tokenizer`.
        number: of guesses for each mask.
    Raises:
        ConfigError: a text has no mask, or more tokens than the model has positions; there are not so many tokens.
    """
    vocab_size = check_guesses(model.config, tokenizer, number)
    prompts = masked_prompts(model.config, tokenizer, texts)
    tokens_bs, padding_b = pad_in_front(prompts, model.device)
    logits_bsv = model(tokens_bs, padding_b=padding_b)[..., :vocab_size]
    return [_filled(tokenizer, ids, logits_sv, number) for ids, logits_sv in zip(prompts, logits_bsv, strict=True)]


def check_guesses(config: ModelConfig, tokenizer: MarkedTokenizer, number: int) -> int:
    """Returns how many tokens there are to guess; raises ConfigError if there are not so many."""
    vocab_size = min(tokenizer.vocab_size, config.vocab_size)
    if not 1 <= number <= vocab_size:
        raise ConfigError(f"the number of guesses ({number}) must be between 1 and the vocabulary's {vocab_size}")
    return vocab_size


def masked_prompts(config: ModelConfig, tokenizer: MarkedTokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts to fill in.

    Raises:
        ConfigError: a text has no mask, or more tokens than the model has positions.
    """
    prompts = [tokenizer.encode(text) for text in texts]
    for text, ids in zip(texts, prompts, strict=True):
        if tokenizer.ids[0] not in ids:
            raise ConfigError(f"there is nothing to fill in, no {tokenizer.names[0]}, in {text!r}")
        if len(ids) > config.seq_length:
            raise ConfigError(f"a text has {len(ids)} tokens, but the model's have at most {config.seq_length}")
    return prompts


def _filled(tokenizer: MarkedTokenizer, ids: list[int], logits_sv: Tensor, number: int) -> Filled:
    """Of one text, whose tokens have the last logits."""
    masks = [place for place, token in enumerate(ids) if token == tokenizer.ids[0]]
    best = logits_sv[-len(ids) :][masks].softmax(dim=-1).topk(number, dim=-1)
    filled, guesses = list(ids), []
    for place, tokens, chances in zip(masks, best.indices.tolist(), best.values.tolist(), strict=True):
        filled[place] = tokens[0]
        guesses.append([Guess(tokenizer.decode([token]), p) for token, p in zip(tokens, chances, strict=True)])
    return Filled(tokenizer.decode(filled[1:-1]), guesses)
