"""Tokenizers for transformers: a tokenizer.json is copied, a SentencePiece BPE model is also written as one."""

import shutil
from pathlib import Path
from typing import Any

import tokenizers
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import decoders, models, normalizers

from ssd_megatron.data.tokenizers import load_tokenizer
from ssd_megatron.errors import ConfigError
from ssd_megatron.export.hf_folder import write_json

TOKENIZER_JSON, SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
SPACE = "\u2581"  # SentencePiece's sign for it


def write_tokenizer(path: Path, folder: Path, length: int) -> tuple[int, int]:
    """Write the tokenizer of `path` into an exported model's folder; returns the id that ends a document, and how many
    ids there are.

    Args:
        length: most tokens of a text, for those who use the model.
    """
    tokenizer = load_tokenizer(path)
    if path.suffix == ".json":
        shutil.copyfile(path, folder / TOKENIZER_JSON)
    else:
        shutil.copyfile(path, folder / SENTENCEPIECE)
        from_sentencepiece(path).save(str(folder / TOKENIZER_JSON))
    eod = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_JSON)).id_to_token(tokenizer.eod)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eod,
        "pad_token": eod,
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", settings)
    return tokenizer.eod, tokenizer.vocab_size


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
        kind.CONTROL: lambda piece: tokenizers.AddedToken(piece, special=True, normalized=False),
        kind.UNKNOWN: lambda piece: tokenizers.AddedToken(piece, special=True, normalized=False),
        # Found before anything is merged, and never cut.
        kind.USER_DEFINED: lambda piece: tokenizers.AddedToken(piece, normalized=False),
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
