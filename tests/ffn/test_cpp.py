"""Backend cpp: what test_kernels.py does not ask of all fast backends."""

import stat
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ssd_megatron.ffn.activations import ACTIVATIONS
from ssd_megatron.ffn.homes import Homes
from ssd_megatron.ffn.kernels import cpp_build, cpp_router
from ssd_megatron.ffn.kernels.cpp_products import sort_copies
from ssd_megatron.ffn.routers import Router
from ssd_megatron.ffn.switchable import FFNSettings, SwitchableFFN
from ssd_megatron.parallel.topology import Topology
from tests.ffn.helpers import HAS_CPP, assert_close, choose, make_bank, make_inputs, relative_error, run
from tests.layouts import TP2_EP2
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(not HAS_CPP, reason="needs AVX-512, AMX and a C++ compiler")

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("add_bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("hidden", "size", "scaled"), [(33, 7, True), (160, 64, False)])
def test_any_sizes_give_what_reference_gives(
    hidden: int, size: int, scaled: bool, activation: str, add_bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    bank = make_bank(hidden, 5 * size, activation, add_bias, dtype)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.mul_(0.3)
    x, dy = make_inputs(300, hidden, dtype)
    ids, gates = choose(300, 5, 2, skew=1.0), torch.ones(300, 2, requires_grad=True)
    ids[torch.rand(ids.shape) < 0.2] = -1  # computed elsewhere
    if scaled:
        gates = torch.rand(300, 2, requires_grad=True)
    got = run("cpp", x, dy, ids, gates, bank, 5, scaled)
    assert all(got[name].dtype == (torch.float32 if name == "gate" else dtype) for name in got)
    wanted = run("reference", x.detach().float().requires_grad_(), dy.float(), ids, gates, bank.float(), 5, scaled)
    assert_close({name: t.float() for name, t in got.items()}, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    bank = make_bank(96, 8 * 40, "relu", True, dtype)
    x, dy = make_inputs(1000, 96, dtype)
    ids, gates = choose(1000, 8, 3, skew=2.0), torch.ones(1000, 3, requires_grad=True)
    threads, results = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        results.append(run("cpp", x, dy, ids, gates, bank, 8))
    torch.set_num_threads(threads)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_copies_are_sorted_by_expert_and_those_for_elsewhere_left_out() -> None:
    rows = sort_copies(torch.tensor([[2, 0], [-1, 2], [0, -1], [2, 1]]), 4)
    assert rows.first_E.tolist() == [0, 2, 3, 6, 6]
    assert rows.token_C.tolist() == [0, 2, 3, 0, 1, 3]
    assert rows.copy_C.tolist() == [1, 4, 7, 0, 3, 6]
    ids = torch.randint(-1, 9, (3000, 2))
    rows, kept = sort_copies(ids, 9), (ids.flatten() >= 0).nonzero().flatten()
    assert torch.equal(rows.copy_C.long(), kept[ids.flatten()[kept].argsort(stable=True)])
    assert torch.equal(rows.token_C, rows.copy_C // 2)
    assert rows.first_E.diff().tolist() == ids[ids >= 0].bincount(minlength=9).tolist()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("tokens", "hidden", "experts", "top_k"), [(300, 64, 16, 4), (70, 33, 40, 11), (5, 8, 9, 2), (0, 32, 8, 2)]
)
def test_router_is_that_of_torch(
    tokens: int, hidden: int, experts: int, top_k: int, bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight, dgates = torch.randn(experts, hidden), torch.randn(tokens, top_k)
    x, dx = make_inputs(tokens, hidden, dtype)
    results = []
    for backend in ("torch", "cpp"):
        router = Router(hidden, experts, top_k, "straight_through", balance_bias=bias, backend=backend, dtype=dtype)
        with torch.no_grad():
            router.weight.copy_(weight)
            if router.bias is not None:
                router.bias.copy_(weight[:, 0])
        ids, gates, inputs, _ = router.route(x)
        own = torch.autograd.grad(gates, [x, router.weight], dgates, retain_graph=True)
        with_others = torch.autograd.grad([gates, inputs], [x, router.weight], [dgates, dx])
        results.append((ids, *own, *with_others))
    (ids, *wanted), (same_ids, *got) = results
    assert torch.equal(ids, same_ids)
    assert all(relative_error(a, b) < TOLERANCE[dtype] for a, b in zip(got, wanted, strict=True))


def test_of_equal_scores_the_first_experts_are_taken_and_of_broken_ones_still_experts() -> None:
    ones = torch.ones(3, 64)
    assert cpp_router.top_k(cpp_router.expert_scores(ones, torch.ones(9, 64)), 3).tolist() == [[0, 1, 2]] * 3
    broken = cpp_router.expert_scores(ones * torch.nan, torch.ones(9, 64))
    assert cpp_router.top_k(broken, 3).tolist() == [[0, 1, 2]] * 3


@pytest.mark.parametrize("sign", [1, -1])
def test_a_broken_score_is_above_all_as_in_torch(sign: int) -> None:
    weight = torch.randn(9, 64)
    weight[7] = torch.tensor(torch.nan).copysign(torch.tensor(float(sign)))
    scores = cpp_router.expert_scores(torch.randn(40, 64), weight)
    ids = cpp_router.top_k(scores, 2)
    assert (ids[:, 0] == 7).all()
    assert cpp_router.softmax(scores, ids).isnan().all()


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_recording_what_is_chosen_changes_no_bit(backend: str) -> None:
    torch.manual_seed(0)
    router = Router(33, 40, 5, "straight_through", backend=backend)
    torch.nn.init.normal_(router.weight)
    x, dgates = torch.randn(70, 33).requires_grad_(), torch.randn(70, 5)
    plain, recorded = router.route(x), router.route(x, chosen=torch.clone)
    assert torch.equal(plain.expert_ids_TK, recorded.expert_ids_TK)
    gradients = [torch.autograd.grad(routing.gates_TK, [x, router.weight], dgates) for routing in (plain, recorded)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def network_on_ranks(topology: Topology) -> list[float]:
    """Errors of this rank's output and gradients relative to those of backend torch."""
    results: list[list[Tensor]] = []
    for backend in ("torch", "cpp"):
        torch.manual_seed(0)
        settings = FFNSettings(48, 8 * 24, "relu", True, 8, 3, "straight_through", backend)
        ffn = SwitchableFFN(SimpleNamespace(params_dtype=torch.float32), settings, Homes(topology))
        with torch.no_grad():
            for parameter in ffn.parameters():
                parameter.normal_()
        x = torch.randn(20, 2, 48).requires_grad_()
        ffn.mode = "sparse"
        y, _ = ffn(x)
        wanted = [x, ffn.router.weight, *ffn.bank.neuron_parameters().values()]
        results.append([y, *torch.autograd.grad(y, wanted, torch.randn(20, 2, 48))])
    return [relative_error(a, b) for a, b in zip(*results, strict=True)]


def test_homes_give_what_those_of_torch_give() -> None:
    for errors in run_ranks(TP2_EP2.ranks, network_on_ranks, parallel=TP2_EP2.parallel):
        assert max(errors) < 1e-5, errors


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache without a library, and a compiler that copies the one there is."""
    built, compiler = tmp_path / "built.so", tmp_path / "compiler"
    cpp_build.library()
    built.write_bytes(cpp_build._library_path().read_bytes())
    compiler.write_text(f'#!/bin/sh\nfor last; do :; done\ncp {built} "$last"\n')
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cpp_build.library.cache_clear()
    yield tmp_path / "cache" / "ssd_megatron"
    cpp_build.library.cache_clear()


def test_a_library_is_built_once_and_what_a_killed_build_left_is_in_nobodys_way(empty_cache: Path) -> None:
    left_over = empty_cache / "build-killed"
    left_over.mkdir(parents=True)
    (left_over / cpp_build._library_path().name).write_bytes(b"half a library")
    _, seconds = cpp_build.library()
    assert seconds > 0
    assert cpp_build.spent("cpp") == f", compiled in {seconds:.0f} s, once per machine"
    assert sorted(path.name for path in empty_cache.iterdir()) == ["build-killed", cpp_build._library_path().name]
    cpp_build.library.cache_clear()
    assert cpp_build.library()[1] == 0.0
    assert cpp_build.spent("cpp") == ""


def test_a_compiler_that_fails_or_is_missing_is_told(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert cpp_build.lacking(torch.float32) == "a C++ compiler (no-such-compiler, or what CXX names)"
    with pytest.raises(RuntimeError, match=r"cannot be built: .*No such file or directory: 'no-such-compiler'"):
        cpp_build.library()
    failing = empty_cache.parents[1] / "failing"
    failing.write_text("#!/bin/sh\necho 'x.cpp:1: error: no AMX' >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setenv("CXX", str(failing))
    with pytest.raises(RuntimeError, match=r"cannot be built: x.cpp:1: error: no AMX \(in .*; XDG_CACHE_HOME moves it"):
        cpp_build.library()
