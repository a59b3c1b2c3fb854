"""Steps as a CUDA graph holds them, on a CPU: the logits and tokens of steps whose shapes grow."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ssd_megatron.inference import steps
from ssd_megatron.inference.cache import pad_in_front
from ssd_megatron.inference.generate import generate
from ssd_megatron.inference.load import load
from ssd_megatron.inference.model import CausalModel, Model
from ssd_megatron.inference.place import Place
from ssd_megatron.inference.sampling import Sampling
from ssd_megatron.inference.steps import Continues, Replays
from ssd_megatron.inference.t5 import EncoderDecoder
from tests.saved_models import LEARNED, ROPE, T5, trained

MODELS: dict[str, dict[str, Any]] = {
    "learned positions": LEARNED,
    "rope, grouped queries, gate, untied": ROPE,
    "t5": T5,
    "positions choose": {"ssd": {"router": "random"}},
}
PROMPTS = [[5, 9, 300], [17], [400, 3, 8, 8, 1]]


class Recording(TorchDispatchMode):
    """What a CUDA graph holds: operators with the arguments that they had, numbers of Python among them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "waits for the device"
        self.calls.append((func, args, kwargs or {}, result := func(*args, **kwargs or {})))
        return result

    def replay(self) -> None:
        made: dict[int, Any] = {}

        def again(leaf: Any) -> Any:
            return made.get(id(leaf), leaf)

        for func, args, kwargs, before in self.calls:
            now = func(*tree_map(again, args), **tree_map(again, kwargs))
            made |= {id(a): b for a, b in zip(tree_leaves(before), tree_leaves(now), strict=True)}


def record(launch: Callable[[], None]) -> Callable[[], None]:
    recording = Recording()
    with recording:
        launch()
    return recording.replay


def run(launch: Callable[[], None]) -> Callable[[], None]:
    """Of kernels that look at their inputs on a CPU: sparse ones, and those of one or two tokens."""
    launch()
    return launch


def texts_of(model: Model, inputs: dict[str, Tensor]) -> tuple[Continues, list[list[int]]]:
    """What continues texts, and some of them; those of T5's decoder begin in the first slot."""
    if isinstance(model, EncoderDecoder):
        return model.encode(torch.cat([inputs["tokens"], inputs["tokens"][:1]])), [[0], [0], [7]]
    assert isinstance(model, CausalModel)
    return model, PROMPTS


@pytest.mark.parametrize("mode", ["dense", "sparse"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_growing_shapes(
    tmp_path: Path, name: str, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "SLOTS", 4)  # so that there are graphs of 4, 8 and 16
    monkeypatch.setattr(steps, "FIRST_STEPS", 0)
    monkeypatch.setattr(Model, "can_replay", lambda *_: True)
    expected = trained(**MODELS[name])
    model, prompts = texts_of(load(expected.write(tmp_path), mode=mode), expected.inputs)
    tokens_bs, padding_b = pad_in_front(prompts, model.device)
    fed = torch.randint(0, 480, (3, 16 - tokens_bs.size(1)), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(3, 16, padding_b)
    replays = Replays(model, 3, 16, record if mode == "dense" else run)
    step = replays.begin(model, padding_b)
    for new_bs in (tokens_bs, *(fed[:, place, None] for place in range(fed.size(1)))):
        torch.testing.assert_close(step(new_bs), model(new_bs, cache, last_only=True), rtol=1e-5, atol=1e-5)
    assert replays.cache.length == cache.length == 16
    torch.testing.assert_close(replays.cache.keys, cache.keys, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["dense", "sparse"])
@pytest.mark.parametrize("name", MODELS)
def test_texts_are_the_same_and_memory_is_kept(
    tmp_path: Path, name: str, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = trained(**MODELS[name])
    loaded = load(expected.write(tmp_path), mode=mode)
    model, prompts = texts_of(loaded, expected.inputs)

    def texts(number: int, sampling: Sampling) -> list[list[int | None]]:
        return list(generate(model, prompts[:number] * (3 // number), sampling, 8))

    ways = [(3, Sampling(greedy=True)), (1, Sampling(seed=1)), (3, Sampling(seed=2, repetition_penalty=1.5))]
    wanted = [texts(*way) for way in ways]
    assert model.kept is None  # a CPU launches each step
    captures: list[str] = []

    def capture(launch: Callable[[], None]) -> Callable[[], None]:
        captures.append(str(loaded.ffns[0].mode))
        return run(launch)

    monkeypatch.setattr(steps, "FEWEST_STEPS", 8)
    monkeypatch.setattr(steps, "FIRST_STEPS", 2)
    monkeypatch.setattr(steps, "GraphCapture", lambda _device: capture)
    monkeypatch.setattr(Model, "can_replay", lambda *_: True)
    assert texts(*ways[0]) == wanted[0]
    kept = model.kept
    assert [texts(*way) for way in ways[1:]] == wanted[1:]
    loaded.set_mode("dense")
    dense = texts(*ways[0])
    loaded.set_mode(mode)
    assert texts(*ways[0]) == wanted[0] and (mode == "dense" or dense != wanted[0])
    assert model.kept is kept and captures == list(dict.fromkeys([mode, "dense"]))


def test_texts_in_turns_have_memory_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(trained(**ROPE).write(tmp_path), mode="sparse")
    assert isinstance(model, CausalModel)
    alone = [list(generate(model, [prompt], Sampling(greedy=True), 20)) for prompt in PROMPTS[:2]]
    monkeypatch.setattr(steps, "GraphCapture", lambda _device: run)
    monkeypatch.setattr(Model, "can_replay", lambda *_: True)
    first, second = (generate(model, [prompt], Sampling(greedy=True), 20) for prompt in PROMPTS[:2])
    assert [list(turn) for turn in zip(*zip(first, second, strict=True), strict=True)] == alone
    assert model.kept is not None and not model.kept.have_room(2, 20) and not model.kept.have_room(1, 129)
    unfinished = generate(model, PROMPTS[:1], Sampling(greedy=True), 20)
    next(unfinished)
    assert model.kept is None
    unfinished.close()
    assert model.kept is not None and model.kept.have_room(1, 128)


def test_a_mode_may_change_between_steps_and_nothing_of_earlier_texts_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(trained(**ROPE).write(tmp_path), mode="dense")
    assert isinstance(model, CausalModel)

    def texts() -> list[list[int | None]]:
        model.set_mode("dense")
        steps = generate(model, PROMPTS[:1], Sampling(greedy=True), 16)
        found = [next(steps) for _ in range(8)]
        model.set_mode("sparse")
        return [*found, *steps]

    wanted = texts()
    monkeypatch.setattr(steps, "GraphCapture", lambda _device: run)
    monkeypatch.setattr(steps, "FIRST_STEPS", 2)
    monkeypatch.setattr(Model, "can_replay", lambda *_: True)
    assert texts() == wanted and model.kept is not None
    with torch.inference_mode():
        for tensor in (*model.kept.cache.keys, *model.kept.cache.values):
            tensor[:, :, : model.kept.cache.length] = torch.nan
    assert texts() == wanted


@pytest.mark.parametrize(
    ("mode", "backend", "tokens", "alike"),
    [
        ("dense", "torch", 1, True),
        ("sparse", "torch", 1, False),
        ("sparse", "triton", 1, True),
        ("sparse", "triton", 64, True),
        ("auto", "torch", 2, False),
        ("auto", "torch", 3, True),
        ("auto", "triton", 2, True),
    ],
)
def test_what_can_be_captured(tmp_path: Path, mode: Any, backend: str, tokens: int, alike: bool) -> None:
    model = load(trained().write(tmp_path), mode=mode)
    for ffn in model.ffns:
        assert ffn.experts is not None
        ffn.experts = replace(ffn.experts, backend=backend)
    assert model.ffns[0].launches_alike(tokens) == alike
    assert not model.can_replay(tokens)  # on a CPU
    model.place = Place(torch.float32, torch.device("cuda"))
    assert model.can_replay(tokens) == alike
    model.graphs = False
    assert not model.can_replay(tokens)
