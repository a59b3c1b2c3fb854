"""Tokenizers for transformers: a SentencePiece BPE model is also written as a tokenizer.json, and texts get the markers
that samples of the model's family have."""

import shutil
from pathlib import Path
from typing import Any

import tokenizers
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken, decoders, models, normalizers, processors

from ssd_megatron.config.model import ModelConfig
from ssd_megatron.data.masking import MASK_TOKENS, marker_ids
from ssd_megatron.data.spans import SENTINEL, free_sentinels, named_sentinels
from ssd_megatron.data.tokenizers import MARKERS, Tokenizer
from ssd_megatron.errors import ConfigError
from ssd_megatron.export.hf_folder import write_json

TOKENIZER_JSON, SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
SPACE = "\u2581"  # SentencePiece's sign for it
# Words begin with their space, so that it belongs to what stands for a word, too.
STAND_FOR_WORDS = frozenset((*MASK_TOKENS, *MARKERS["t5"]))


def write_tokenizer(
    tokenizer: Tokenizer, path: Path, folder: Path, model: ModelConfig, *, was_trained_here: bool
) -> tuple[int, int]:
    """Write a tokenizer, which lies at `path`, into an exported model's folder; returns the id that ends a document,
    and the first id from which on none is used.

    Args:
        was_trained_here: a GPT's texts had no markers; one that comes from elsewhere may have seen those that its
            tokenizer.json adds.
    Raises:
        DataError: the tokenizer lacks what the model's family needs.
    """
    size = tokenizer.vocab_size
    if path.suffix == ".json":
        theirs = tokenizers.Tokenizer.from_file(str(path))
    else:
        shutil.copyfile(path, folder / SENTENCEPIECE)
        theirs = from_sentencepiece(path)
    eod = theirs.id_to_token(tokenizer.eod)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eod,
        "pad_token": eod,
        "model_max_length": model.seq_length,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if model.family == "gpt" and was_trained_here:
        theirs.post_processor = None
    if model.family == "bert":
        ids = marker_ids(tokenizer, path)
        settings |= {name.replace("_id", "_token"): theirs.id_to_token(token) for name, token in ids.items()}
        if model.num_token_types:
            settings["model_input_names"] += ["token_type_ids"]
        _frame(theirs, settings["cls_token"], settings["sep_token"], model.num_token_types > 1)
    if model.family == "t5":
        if not named_sentinels(tokenizer):
            _name_sentinels(theirs, tokenizer, path, model.vocab_size)
            size = model.vocab_size
        _frame(theirs, None, settings["eos_token"])
    theirs.save(str(folder / TOKENIZER_JSON))
    write_json(folder / "tokenizer_config.json", settings)
    return tokenizer.eod, size


def _frame(tokenizer: tokenizers.Tokenizer, before: str | None, after: str, has_kinds: bool = False) -> None:
    """Put a token before a text and one after it, and after a second one, which may be of another kind."""
    first, kind = "" if before is None else f"{before} ", int(has_kinds)
    tokens = [token for token in (before, after) if token is not None]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first}$A {after}",
        pair=f"{first}$A {after} $B:{kind} {after}:{kind}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in tokens],
    )


def _name_sentinels(theirs: tokenizers.Tokenizer, ours: Tokenizer, path: Path, vocab_size: int) -> None:
    """Give the ids that stand for spans names."""
    free = free_sentinels(ours, vocab_size)
    if theirs.get_vocab_size() != ours.vocab_size:
        raise ConfigError(
            f"tokenizer {path} has gaps among its ids, so that {SENTINEL.format(0)} cannot be added: give one that "
            "has it with --tokenizer"
        )
    names = [SENTINEL.format(number) for number in reversed(range(len(free)))]
    theirs.add_special_tokens([AddedToken(name, special=True, normalized=False, lstrip=True) for name in names])


def find_tokenizer(folder: Path) -> Path | None:
    """The tokenizer of an exported model's folder that our data tools read, if there is one."""
    found = [folder / name for name in (SENTENCEPIECE, TOKENIZER_JSON) if (folder / name).exists()]
    return found[0] if found else None


def from_sentencepiece(path: Path) -> tokenizers.Tokenizer:
    """The same tokenizer for the library tokenizers (tests compare their ids).

    A SentencePiece BPE model merges the pair whose whole has the best score, so that its merges in order are all pairs
    of pieces that make a piece, by the score of the whole.

    Raises:
        ConfigError: the model is not one of BPE that leaves texts as they are, as tools/train_tokenizer.py makes.
    """
    model = ModelProto.FromString(path.read_bytes())
    _check_is_plain_bpe(model, path)
    kind = model.SentencePiece
    vocabulary = {entry.piece: number for number, entry in enumerate(model.pieces)}
    merged = [
        (-entry.score, number, entry.piece) for number, entry in enumerate(model.pieces) if entry.type == kind.NORMAL
    ]
    merges = []
    for _, _, piece in sorted(merged):
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
        merges += sorted(known, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    unknown = next(entry.piece for entry in model.pieces if entry.type == kind.UNKNOWN)
    bpe = models.BPE(
        vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=model.trainer_spec.byte_fallback
    )
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    added = {
        kind.CONTROL: lambda piece: AddedToken(piece, special=True, normalized=False, lstrip=piece in STAND_FOR_WORDS),
        kind.UNKNOWN: lambda piece: AddedToken(piece, special=True, normalized=False),
        # Found before anything is merged, and never cut.
        kind.USER_DEFINED: lambda piece: AddedToken(piece, normalized=False),
    }
    for entry in model.pieces:
        if entry.type in added:
            token = added[entry.type](entry.piece)
            add = tokenizer.add_special_tokens if token.special else tokenizer.add_tokens
            add([token])
    return tokenizer


def _check_is_plain_bpe(model: ModelProto, path: Path) -> None:
    normal = model.normalizer_spec
    for is_so, problem in (
        (model.trainer_spec.model_type == model.trainer_spec.BPE, "is not a BPE model"),
        (normal.name == "identity", f"normalises texts ({normal.name})"),
        (not normal.add_dummy_prefix, "puts a space before texts"),
        (not normal.remove_extra_whitespaces, "removes spaces"),
    ):
        if not is_so:
            raise ConfigError(
                f"tokenizer {path} {problem}, and cannot be written as a tokenizer.json: give the tokenizer.json that "
                "belongs to it with --tokenizer"
            )
