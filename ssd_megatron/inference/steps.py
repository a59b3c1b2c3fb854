"""A model's steps through a batch of texts: their prompts, then one token of each at a time.

On a GPU a step of few tokens takes longer to launch than to compute, so it is captured in a CUDA graph and replayed for
each token. A graph holds addresses and arguments: the captured step has its tokens, their slot and its logits always in
the same memory, and looks at as many slots each time (`FixedCache`). Shapes: b batch, s new tokens, v vocabulary.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ssd_megatron.config.model import ModelConfig
from ssd_megatron.inference.cache import Cache, FixedCache, KeyValueCache

# A graph looks at so many slots, or twice as many, and so on: few captures, and at most half of the slots for nothing.
SLOTS = 128
# A capture takes about as long as two steps without a graph, and as many milliseconds more. Texts that cannot have more
# steps than the first are launched, and of others the second, as they may end before a capture would pay.
FEWEST_STEPS, FIRST_STEPS = 16, 8

Step = Callable[[Tensor], Tensor]
Capture = Callable[[Callable[[], None]], Callable[[], None]]  # runs something once, and returns what runs it again


class Continues(Protocol):
    """What gives logits of the next tokens of texts: `CausalModel`, or T5's `Decoder` beside an encoder's texts."""

    kept: "Replays | None"

    @property
    def config(self) -> ModelConfig: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def modes(self) -> Hashable: ...
    def can_replay(self, tokens: int, /) -> bool: ...
    def new_cache(self, batch: int, capacity: int, padding_b: Tensor | None = None) -> KeyValueCache: ...
    def __call__(self, tokens_bs: Tensor, /, cache: Cache | None = None, *, last_only: bool = False) -> Tensor: ...


@contextmanager
def steps_of(model: Continues, tokens_bs: Tensor, padding_b: Tensor | None, steps: int) -> Iterator[Step]:
    """What takes new tokens [b, s], the texts' prompts first, and gives logits after the last of them, [b, 1, v].

    Logits of a replayed step live until the next one. Cache and graphs are kept with the model for the next texts, as
    long as it can replay.

    Args:
        tokens_bs, padding_b: the prompts.
        steps: at most so many, the prompts' included.
    """
    batch, capacity = len(tokens_bs), tokens_bs.size(1) + steps
    if not model.can_replay(batch):
        model.kept = None
    if steps < FEWEST_STEPS or not model.can_replay(batch):
        yield partial(model, cache=model.new_cache(batch, capacity, padding_b), last_only=True)
        return
    replays, model.kept = model.kept, None  # texts that are continued in turns have memory of their own
    if replays is not None and not replays.have_room(batch, capacity):
        replays = None
    if replays is None:
        replays = Replays(model, batch, capacity, GraphCapture(model.device))
    try:
        yield replays.begin(model, padding_b)
    finally:
        model.kept = replays


class Replays:
    """A cache for so many texts, and captured steps that use it, for each number of slots and in each mode.

    Attributes:
        cache: for the prompts, and in all what it holds.
    """

    @torch.inference_mode()
    def __init__(self, model: Continues, batch: int, capacity: int, capture: Capture) -> None:
        self.cache = model.new_cache(batch, -(-capacity // SLOTS) * SLOTS)
        self.cache.length = self.cache.capacity  # whatever happens to be there
        integers = partial(torch.zeros, dtype=torch.int64, device=model.device)
        self._tokens_b1, self._padding_b, self._slot_1 = integers(batch, 1), integers(batch), integers(1)
        self._logits_b1v = torch.empty(batch, 1, model.config.padded_vocab_size, device=model.device)
        self._capture, self._launched = capture, 0
        self._captured: dict[tuple[Hashable, int], Callable[[], None]] = {}

    def have_room(self, batch: int, capacity: int) -> bool:
        return batch == len(self._tokens_b1) and capacity <= self.cache.capacity

    @torch.inference_mode()
    def begin(self, model: Continues, padding_b: Tensor | None) -> Step:
        """The steps of new texts."""
        for tensor in (*self.cache.keys, *self.cache.values):
            # A masked slot's weight is 0, and 0 times what earlier texts have left might be NaN.
            tensor[:, :, : self.cache.length].zero_()
        self.cache.length, self.cache.padding_b, self._launched = 0, padding_b, 0
        self._slot_1.zero_()
        self._padding_b.zero_()
        if padding_b is not None:
            self._padding_b.copy_(padding_b)
        return partial(self._step, model)

    @torch.inference_mode()
    def _step(self, model: Continues, tokens_bs: Tensor) -> Tensor:
        batch, tokens = tokens_bs.shape
        slots = min(self.cache.capacity, max(SLOTS, 1 << self.cache.length.bit_length()))
        known = self._captured.get((model.modes, slots))
        if tokens > 1 or not model.can_replay(batch) or (known is None and self._launched < FIRST_STEPS):
            self._launched += tokens == 1
            logits_b1v = model(tokens_bs, self.cache, last_only=True)
            self._slot_1.fill_(self.cache.length)
            return logits_b1v
        self._tokens_b1.copy_(tokens_bs)
        if known is not None:
            known()
        else:
            cache = FixedCache(self.cache, slots, self._slot_1, self._padding_b)
            self._captured[model.modes, slots] = self._capture(partial(self._forward, model, cache))
        self.cache.advance(1)
        return self._logits_b1v

    def _forward(self, model: Continues, cache: FixedCache) -> None:
        self._logits_b1v.copy_(model(self._tokens_b1, cache, last_only=True))


class GraphCapture:
    """Captures what is launched in CUDA graphs. They share the memory of what comes in between, so that none may be
    replayed while another one runs, and nothing in that memory is read afterwards."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()  # type: ignore[no-untyped-call]

    def __call__(self, launch: Callable[[], None]) -> Callable[[], None]:
        """Runs it once, so that what is compiled, tuned or allocated at first use is there; returns its replay."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                launch()
            current.wait_stream(self._stream)
            try:
                with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                    launch()
            except RuntimeError as error:
                raise RuntimeError(
                    "a step of this model cannot be captured in a CUDA graph: set model.graphs to False "
                    "(tools/generate.py --no_graphs), and each is launched"
                ) from error
        return graph.replay
