"""What the fields of one family of models, and of its objective, must be to each other."""

from collections.abc import Iterator
from typing import Any

from ssd_megatron.config.check_list import CheckList, choices
from ssd_megatron.config.report import problem
from ssd_megatron.config.span_sizes import span_sizes

FAMILY_CHECKS = CheckList()


@FAMILY_CHECKS("data.mask_token_fraction", "data.random_token_fraction")
def _masking(mask: float, random: float) -> Iterator[str]:
    if mask + random > 1 + 1e-9:
        yield problem(
            "data.random_token_fraction",
            random,
            f"+ data.mask_token_fraction ({mask}) must be at most 1: try {max(0.0, 1 - mask):g}",
        )


@FAMILY_CHECKS("model.sentence_objective", "model.num_token_types")
def _segments(objective: str, token_types: int) -> Iterator[str]:
    if objective != "none" and token_types < 2:
        wanted = f'must be at least 2 with model.sentence_objective "{objective}": try 2'
        yield problem("model.num_token_types", token_types, wanted)


@FAMILY_CHECKS("model.family", "model.seq_length")
def _room_for_markers(family: str, length: int) -> Iterator[str]:
    if family == "bert" and length < 8:
        yield problem("model.seq_length", length, "must be at least 8 with bert, whose samples have up to 3 markers")


_T5_HAS = {"position_embedding": "relative", "norm_position": "pre", "add_bias": False}


@FAMILY_CHECKS("model.family", *(f"model.{name}" for name in _T5_HAS))
def _what_t5_has(family: str, *values: Any) -> Iterator[str]:
    for (name, wanted), value in zip(_T5_HAS.items(), values, strict=True):
        if family == "t5" and value != wanted:
            yield problem(f"model.{name}", value, f"does not go with t5: use {choices((wanted,))}")
    if family != "t5" and values[0] == "relative":
        yield problem("model.position_embedding", "relative", f"does not go with {family}: use learned or rope")


@FAMILY_CHECKS("model.family", "model.num_attention_heads", "model.num_query_groups")
def _heads_of_t5(family: str, heads: int, groups: int) -> Iterator[str]:
    if family == "t5" and groups != heads:
        yield problem(
            "model.num_query_groups", groups, f"must be model.num_attention_heads ({heads}) with t5: leave it out"
        )


@FAMILY_CHECKS("model.family", "model.decoder_start_token", "model.vocab_size")
def _decoder_start(family: str, token: int | None, size: int) -> Iterator[str]:
    if family == "t5" and token is not None and token >= size:
        yield problem(
            "model.decoder_start_token",
            token,
            f"must be below model.vocab_size ({size}): leave it out for the token that ends a document",
        )


@FAMILY_CHECKS("model.relative_attention_num_buckets", "model.relative_attention_max_distance")
def _buckets(buckets: int, distance: int) -> Iterator[str]:
    if distance <= buckets // 2:
        yield problem(
            "model.relative_attention_max_distance",
            distance,
            f"must be above half of model.relative_attention_num_buckets ({buckets}): try {4 * buckets}",
        )


@FAMILY_CHECKS(
    "model.family", "model.seq_length", "model.decoder_seq_length", "data.mask_fraction", "data.mean_span_length"
)
def _room_for_spans(family: str, length: int, decoder_length: int, fraction: float, mean: float) -> Iterator[str]:
    if family != "t5":
        return
    if length < 4:
        yield problem("model.seq_length", length, "must be at least 4 with t5")
        return
    sizes = span_sizes(length, fraction, mean)
    needed = sizes.targets
    if sizes.inputs != length:
        yield problem(
            "data.mask_fraction",
            fraction,
            f"with data.mean_span_length ({mean}) makes no samples of exactly model.seq_length ({length}) tokens: try "
            "a smaller fraction or longer spans",
        )
    elif decoder_length < needed:
        yield problem(
            "model.decoder_seq_length",
            decoder_length,
            f"is too short for the spans of model.seq_length ({length}), data.mask_fraction ({fraction}) and "
            f"data.mean_span_length ({mean}): try {needed}",
        )
