"""Keys and values of the tokens that a model has seen, in memory that is allocated once.

Shapes: b batch, s new tokens, S tokens in all, g key/value heads, d head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


class KeyValueCache:
    """Room for `capacity` tokens of each of a batch of texts, in each layer.

    Texts of different lengths end in the same slot: the first `padding_b` slots of each hold no token.

    Attributes:
        length: slots in use.
        padding_b: int64 [b], or None if all texts are equally long.
    """

    def __init__(
        self,
        layers: int,
        shape_bgd: tuple[int, int, int],
        capacity: int,
        padding_b: Tensor | None,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        b, g, d = shape_bgd
        self.keys, self.values = (
            [torch.empty(b, g, capacity, d, dtype=dtype, device=device) for _ in range(layers)] for _ in range(2)
        )
        self.capacity, self.device = capacity, device
        self.padding_b = padding_b
        self.length = 0

    def append(self, layer: int, key_bgsd: Tensor, value_bgsd: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens' keys and values; returns those of all tokens, [b, g, S, d]. `length` stays as it is
        until `advance`: each layer writes the same slots."""
        stop = self.length + key_bgsd.size(2)
        assert stop <= self.capacity, (stop, self.capacity)
        self.keys[layer][:, :, self.length : stop] = key_bgsd
        self.values[layer][:, :, self.length : stop] = value_bgsd
        return self.keys[layer][:, :, :stop], self.values[layer][:, :, :stop]

    def advance(self, tokens: int) -> None:
        self.length += tokens

    def slots(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Those of so many new tokens [s], and all that are then in use [S]."""
        slots_S = torch.arange(self.length + tokens, device=self.device)
        return slots_S[self.length :], slots_S

    def view(self, tokens: int) -> "View":
        """What so many new tokens see."""
        return view_of(tokens, self.length, self.padding_b, self.device)


class FixedCache:
    """The first slots of a cache for one new token of each text, whose slot the device alone knows: shapes, memory and
    what is launched are the same for every token, so that a CUDA graph can hold it. Slots not in use are masked.

    Attributes:
        slot_1: int64 [1], of the new token; a step leaves it at the next one.
        padding_b: int64 [b].
    """

    def __init__(self, cache: KeyValueCache, slots: int, slot_1: Tensor, padding_b: Tensor) -> None:
        self._keys, self._values = ([t[:, :, :slots] for t in part] for part in (cache.keys, cache.values))
        self._count, self.slot_1, self.padding_b = slots, slot_1, padding_b

    def append(self, layer: int, key_bgsd: Tensor, value_bgsd: Tensor) -> tuple[Tensor, Tensor]:
        """As `KeyValueCache.append`; returns all slots."""
        self._keys[layer].index_copy_(2, self.slot_1, key_bgsd)
        self._values[layer].index_copy_(2, self.slot_1, value_bgsd)
        return self._keys[layer], self._values[layer]

    def advance(self, tokens: int) -> None:
        self.slot_1.add_(tokens)

    def slots(self, _tokens: int) -> tuple[Tensor, Tensor]:
        return self.slot_1, torch.arange(self._count, device=self.slot_1.device)

    def view(self, tokens: int) -> "View":
        view = padded_view(*self.slots(tokens), self.padding_b)
        assert view.mask is not None
        # Added to scores, once for all layers: each would turn truth values into that.
        added = torch.zeros(view.mask.shape, dtype=self._keys[0].dtype, device=view.mask.device)
        return replace(view, mask=added.masked_fill_(~view.mask, float("-inf")))


Cache = KeyValueCache | FixedCache


@dataclass(frozen=True)
class View:
    """What new tokens see.

    Attributes:
        positions_bs: of the new tokens in their texts, int64 [b or 1, s].
        mask: bool [b or 1, 1, s, S], True where a token looks; or what is added to scores, [b or 1, n, s, S]; None if
            `causal` says it, or if it looks at everything.
        causal: each new token looks at itself and those before it, and there are no others.
        rotation: of queries and keys by their positions, see `layers.rotary`.
    """

    positions_bs: Tensor
    mask: Tensor | None
    causal: bool
    rotation: tuple[Tensor, Tensor] | None = None


def pad_in_front(texts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Token ids of texts [b, longest], int64, and how many slots at the beginning of each hold none [b], or None if all
    are equally long."""
    longest = max(map(len, texts))
    padding = [longest - len(text) for text in texts]
    rows = [[0] * missing + list(text) for missing, text in zip(padding, texts, strict=True)]
    return torch.tensor(rows, device=device), torch.tensor(padding, device=device) if any(padding) else None


def view_of(tokens: int, past: int, padding_b: Tensor | None, device: torch.device) -> View:
    """Of `tokens` new tokens after `past` slots."""
    slots_s = torch.arange(past, past + tokens, device=device)
    if padding_b is None:
        if past == 0 or tokens == 1:
            return View(slots_s[None], None, causal=past == 0 and tokens > 1)
        return View(slots_s[None], (torch.arange(past + tokens, device=device) <= slots_s[:, None])[None, None], False)
    return padded_view(slots_s, torch.arange(past + tokens, device=device), padding_b)


def padded_view(slots_s: Tensor, keys_S: Tensor, padding_b: Tensor) -> View:
    """Of new tokens in some of the slots. Padding looks at itself, so that nothing becomes NaN."""
    is_token_bS = keys_S >= padding_b[:, None]
    before_sS = keys_S <= slots_s[:, None]
    itself_sS = keys_S == slots_s[:, None]
    mask = (is_token_bS[:, None] & before_sS) | itself_sS
    return View((slots_s - padding_b[:, None]).clamp_(min=0), mask[:, None], causal=False)


def whole_view(tokens: int, padding_b: Tensor | None, device: torch.device) -> View:
    """Of texts in which every token looks at all of them."""
    slots_s = torch.arange(tokens, device=device)
    if padding_b is None:
        return View(slots_s[None], None, causal=False)
    is_token_bs = slots_s >= padding_b[:, None]
    return View((slots_s - padding_b[:, None]).clamp_(min=0), is_token_bs[:, None, None], causal=False)
