"""A GPT's checkpoint as a model of lm-evaluation-harness, whose tasks evaluate it. The harness finds only models of its
own, so that this module starts it in the place of `lm_eval`, with the same arguments:

    python -m ssd_megatron.inference.harness run --model ssd_megatron --tasks TASK,... --batch_size 8 \
        --model_args path=DIR,mode=sparse,top_k=4,dtype=bf16

Needs the package lm_eval: pip install -e '.[eval]'.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval._cli import HarnessCLI
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry
from lm_eval.models.utils import Collator, handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, setup_logging
from torch.nn.utils.rnn import pad_sequence

from ssd_megatron.errors import ConfigError, DataError
from ssd_megatron.inference.ffn import Mode
from ssd_megatron.inference.load import DTYPES, from_saved, refuse_in_dense
from ssd_megatron.inference.model import CausalModel
from ssd_megatron.inference.sampling import Sampling
from ssd_megatron.inference.text import complete_tokens
from ssd_megatron.parallel.device import local_device
from ssd_megatron.training.exit_status import exit_status
from ssd_megatron.training.saved_model import open_model, open_tokenizer

NAME = "ssd_megatron"
MODES = ("dense", "sparse")  # `auto` would go by the tokens of a batch, and results by the batch size
UNSAID = "cuda:0"  # what the harness says on any machine where the user names no device
MOST_NEW_TOKENS = 256  # of a task that does not say, as with the harness's own models

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # texts, and tokens of context and continuation


class HarnessModel(TemplateLM):  # type: ignore[misc]  # the package has no types
    """What `--model_args` says: see `ssd_megatron.inference.load.load`.

    Args:
        path: a run_dir or the folder of one checkpoint.
        mode: dense or sparse.
        top_k: experts per token, mean over layers; as trained without it.
        dtype: a name in DTYPES.
        tokenizer: the one that the model was trained with without it.
        batch_size, max_batch_size, device: the harness's own arguments; there is no search for a batch size.
    Raises:
        ConfigError: the model cannot run as asked.
        DataError, CheckpointError: there is no checkpoint, or it cannot be read.
    """

    def __init__(
        self,
        path: str,
        mode: str = "dense",
        top_k: float | None = None,
        dtype: str = "fp32",
        tokenizer: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        for name, value, choices in (("mode", mode, MODES), ("dtype", dtype, tuple(DTYPES))):
            if value not in choices:
                raise ConfigError(f"{name} ({value}) of --model_args must be one of {', '.join(choices)}")
        refuse_in_dense([mode], {"top_k": top_k})
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ConfigError(f"batch_size ({batch_size}) must be a number: the model does not look for one")
        if max_batch_size is not None:
            raise ConfigError(f"max_batch_size ({max_batch_size}) has no effect: set batch_size")
        saved = open_model(Path(path))
        if saved.settings.model.family != "gpt":
            raise ConfigError(f"model.family ({saved.settings.model.family}) cannot be evaluated so: use a gpt")
        self._tokenizer, _ = open_tokenizer(saved, None if tokenizer is None else Path(tokenizer))
        run_as: Mode = "sparse" if mode == "sparse" else "dense"
        model = from_saved(saved, _device(device), DTYPES[dtype], run_as, top_k)
        assert isinstance(model, CausalModel)
        self._model = model
        self._batch_size = int(batch_size)
        self._device = self._model.device
        self._length = saved.settings.model.seq_length

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eod

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_unused_here: object) -> list[int]:
        return self._tokenizer.encode(string)

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts: windows that each have as much before them as fits, and predict every token once."""
        windows: list[Request] = []
        numbers: list[int] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self._length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                numbers.append(number)
        sums = [0.0] * len(requests)
        for number, (log_p, _) in zip(numbers, self._loglikelihood_tokens(windows), strict=True):
            sums[number] += log_p
        for request, log_p in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, log_p)
        return sums

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        order = Collator(
            [request.args for request in requests],
            sort_fn=lambda asked: (-len(self.tok_encode(asked[0])), asked[0]),
            group_by="gen_kwargs",
            group_fn=lambda asked: asked[1],
        )
        found: list[str] = []
        for batch in order.get_batched(n=self._batch_size):
            texts = self._generate([context for context, _ in batch], batch[0][1])
            for asked, text in zip(batch, texts, strict=True):
                self.cache_hook.add_partial("generate_until", asked, text)
            found += texts
        in_order: list[str] = order.get_original(found)
        return in_order

    def _generate(self, contexts: list[str], arguments: dict[str, Any]) -> list[str]:
        asked = normalize_gen_kwargs(arguments, MOST_NEW_TOKENS)
        stop = handle_stop_sequences(asked.pop("until", None), eos=None)
        new = asked.pop("max_gen_toks")
        if new >= self._length:
            raise ConfigError(f"max_gen_toks ({new}) must be below the model's {self._length} tokens: use fewer")
        prompts = [self.tok_encode(context)[new - self._length :] or [self.eot_token_id] for context in contexts]
        texts = [""] * len(prompts)
        for piece in complete_tokens(self._model, self._tokenizer, prompts, _sampling(asked), new, stop):
            texts[piece.number] += piece.text
        return texts

    def _loglikelihood_tokens(self, requests: Sequence[Request], **_unused_here: object) -> list[tuple[float, bool]]:
        order = Collator(requests, sort_fn=lambda request: (-len(request[1] + request[2]), request[1] + request[2]))
        found: list[tuple[float, bool]] = []
        for batch in order.get_batched(n=self._batch_size):
            for (texts, _, _), result in zip(batch, self._score(batch), strict=True):
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, result)
                found.append(result)
        in_order: list[tuple[float, bool]] = order.get_original(found)
        return in_order

    def _score(self, batch: Sequence[Request]) -> Iterator[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether each of its tokens is the likeliest."""
        inputs = []
        for _, context, continuation in batch:
            if len(continuation) > self._length:
                raise DataError(
                    f"a continuation has {len(continuation)} tokens, but the model's texts have {self._length}"
                )
            inputs.append(torch.tensor((context + continuation)[-(self._length + 1) : -1], device=self.device))
        logits_bsv = self._model(pad_sequence(inputs, batch_first=True))  # what comes after a text does not change it
        for logits_sv, tokens, (_, _, continuation) in zip(logits_bsv, inputs, batch, strict=True):
            targets = torch.tensor(continuation, device=self.device)
            predicted_sv = logits_sv[len(tokens) - len(targets) : len(tokens)]
            log_p = -float(F.cross_entropy(predicted_sv, targets, reduction="sum"))
            yield log_p, predicted_sv.argmax(dim=-1).equal(targets)


def _device(asked: str | None) -> torch.device:
    gpus = torch.cuda.device_count()
    if asked is None or (asked == UNSAID and not gpus):
        return local_device()
    here = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{number}" for number in range(gpus))]
    if asked not in here:
        raise ConfigError(f"device ({asked}) is not on this machine: leave it out, or use {' or '.join(here)}")
    return torch.device(asked)


def _sampling(asked: dict[str, Any]) -> Sampling:
    """What a task says of sampling; without `do_sample` that has no effect, as with the harness's own models."""
    fields = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
    unknown = asked.keys() - {"do_sample", *fields}
    if unknown:
        raise ConfigError(
            f"{', '.join(sorted(unknown))} of the task's generation has no equivalent: {', '.join(fields)} have"
        )
    if asked["do_sample"]:
        return Sampling(**{name: asked[name] for name in fields if name in asked})
    return Sampling(greedy=True, repetition_penalty=asked.get("repetition_penalty", 1.0))


def register() -> None:
    """Make the harness know the model in this process."""
    if NAME not in model_registry:
        model_registry.register(NAME, target=HarnessModel)


def main() -> int:
    """Run the harness; returns the exit status: 0 done, 1 the checkpoint is damaged, 2 it cannot be used so."""
    register()
    setup_logging()
    harness = HarnessCLI()
    return exit_status(lambda: harness.execute(harness.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
