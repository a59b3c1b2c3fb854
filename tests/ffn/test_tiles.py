from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ssd_megatron.ffn.activations import ACTIVATIONS
from ssd_megatron.ffn.kernels import sparse_ffn, tiles_pay, torch_tiles
from ssd_megatron.ffn.kernels.torch_tiles import tiled_ffn
from ssd_megatron.ffn.switchable import SwitchableFFN
from ssd_megatron.ffn.tiles import cut, join, of_tokens, tile_inputs
from tests.ffn.helpers import PLAIN, assert_close, brute_force, choose, gradients, make_bank, relative_error
from tests.ffn.test_switchable import make_ffn
from tests.ffn.test_switchable import run as run_ffn

HIDDEN, BATCH, TILE = 16, 3, 4


def inputs(length: int, batch: int = BATCH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, dy = torch.randn(2, length, batch, HIDDEN, generator=generator, dtype=torch.float64)
    return x.requires_grad_(), dy


def tiled(**changes: object) -> SwitchableFFN:
    """Experts of 4 neurons: a whole tile of 4 tokens is computed as one piece by the torch backend."""
    return make_ffn(num_experts=16, top_k=3, routing_granularity=TILE, **changes)


@pytest.mark.parametrize("length", [3, 4, 8, 10])
def test_a_tile_goes_by_the_tile_before_and_the_first_by_its_first_token(length: int) -> None:
    x, _ = inputs(length)
    wanted = [x[0]] + [x[first - TILE : first].mean(0) for first in range(TILE, length, TILE)]
    got = tile_inputs(x, TILE)
    assert relative_error(got, torch.cat(wanted)) < 1e-15
    of_token = of_tokens(got, length, BATCH, TILE).view(length, BATCH, HIDDEN)
    assert all(torch.equal(of_token[token], got.view(-1, BATCH, HIDDEN)[token // TILE]) for token in range(length))


def test_tiles_are_cut_and_joined_by_sequence() -> None:
    x, _ = inputs(8)
    tiles = cut(x, TILE)
    assert torch.equal(tiles[1 * BATCH + 2], x[TILE:, 2])  # the third sequence's second tile
    assert torch.equal(join(tiles, 8, BATCH), x)


@pytest.mark.parametrize("update", ["straight_through", "avg_k"])
@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("length", [12, 10])
def test_no_output_depends_on_a_later_token(length: int, backend: str, update: str) -> None:
    ffn, (x, _) = tiled(backend=backend, router_update=update), inputs(length)
    ffn.mode = "sparse"
    before = ffn(x)[0]
    changed_later = 0
    for first in range(1, length):
        perturbed = x.detach().clone()
        perturbed[first:] += 3 * torch.randn(length - first, BATCH, HIDDEN, dtype=x.dtype)
        after = ffn(perturbed)[0]
        # Matmuls of other shapes may differ in the last bit; another expert differs by far more.
        assert (after[:first] - before[:first]).abs().max() < 1e-12, first
        changed_later += int((after[first:] - before[first:]).abs().min() > 0)
    assert changed_later > 0


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("length", [12, 10])
@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_straight_through_gradients_are_those_of_brute_force(activation: str, length: int, backend: str) -> None:
    ffn, (x, dy) = tiled(backend=backend, activation=activation), inputs(length)
    y, got = run_ffn(ffn, "sparse", x, dy)
    ids, gates = [], []
    for token in range(length):
        first = token // TILE * TILE
        seen_bH = x[0] if first == 0 else x[first - TILE : first].mean(0)
        best = (seen_bH @ ffn.router.weight.T).topk(3)
        p = best.values.softmax(dim=1)
        ids.append(best.indices)
        gates.append(1 + p - p.detach())
    wanted = brute_force(x.flatten(0, 1), torch.cat(ids), torch.cat(gates), ffn.bank, 16)
    assert relative_error(y.flatten(0, 1), wanted) < 1e-12
    given = [x, *ffn.bank.neuron_parameters().values(), ffn.router.weight]
    for name, gradient in zip(got, torch.autograd.grad(wanted, given, dy.flatten(0, 1)), strict=True):
        assert relative_error(got[name], gradient) < 1e-12, name
    assert ffn.expert_load.tolist() == torch.cat(ids).flatten().bincount(minlength=16).tolist()


@pytest.mark.parametrize("update", ["frozen", "avg_k"])
def test_routers_that_learn_nothing_give_no_gradient_to_the_tile_before(update: str) -> None:
    ffn, (x, _) = tiled(router_update=update), inputs(8)
    ffn.mode = "sparse"
    (dx,) = torch.autograd.grad(ffn(x)[0][TILE:].sum(), x)
    assert dx[:TILE].abs().max() == 0 and dx[TILE:].abs().min() > 0
    weight_EH = ffn.bank.w_in.view(16, 4, HIDDEN).mean(1) if update == "avg_k" else ffn.router.weight
    chosen = (tile_inputs(x, TILE) @ weight_EH.T).topk(3).indices
    assert ffn.expert_load.tolist() == (TILE * chosen.flatten().bincount(minlength=16)).tolist()


@pytest.mark.parametrize("backend", PLAIN)
def test_no_sequences_at_all(backend: str) -> None:
    ffn, (x, dy) = tiled(backend=backend), inputs(8, batch=0)
    y, got = run_ffn(ffn, "sparse", x, dy)
    assert y.shape == x.shape
    assert all(not gradient.any() for gradient in got.values())


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("chunk_bytes", [1, 2**23])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("add_bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_tiles_in_one_piece_equal_their_tokens(
    activation: str, add_bias: bool, dtype: torch.dtype, chunk_bytes: int, scaled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_tiles, "CHUNK_BYTES", chunk_bytes)  # 1: a tile at a time
    torch.manual_seed(0)
    bank = make_bank(16, 48, activation, add_bias, dtype)
    ids, size = choose(5, 6, 2), 8
    x, dy = torch.randn(2, 5, size, 16).to(dtype)
    gates = torch.rand(5, 2, dtype=torch.promote_types(dtype, torch.float32)) if scaled else torch.ones(5, 2).double()
    x, gates = x.requires_grad_(), gates.requires_grad_()
    got = gradients(tiled_ffn(x, ids, gates, bank.tensors(), bank.activation, 6, scaled), dy, x, gates, bank)
    per_token = (x.flatten(0, 1), ids.repeat_interleave(size, 0), gates.repeat_interleave(size, 0))
    y = sparse_ffn(*per_token, bank.tensors(), bank.activation, 6, "reference", scaled).view_as(x)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert_close(got, gradients(y, dy, x, gates, bank), tolerance)


def test_gradients_of_many_tiles_in_bf16_are_added_up_in_fp32() -> None:
    torch.manual_seed(0)
    tiles = 256
    bank = make_bank(16, 32, "relu", False, torch.bfloat16)
    x, dy = torch.randn(2, tiles, 8, 16).abs().bfloat16()  # sums that grow, where bf16 would stand still
    ids = choose(tiles, 4, 2)
    exact = make_bank(16, 32, "relu", False, torch.float32)
    exact.load_state_dict(bank.state_dict())

    def w_out(bank: torch.nn.Module, dtype: torch.dtype) -> Tensor:
        y = tiled_ffn(x.to(dtype), ids, None, bank.tensors(), bank.activation, 4)
        return torch.autograd.grad(y, bank.w_out, dy.to(dtype))[0]

    assert relative_error(w_out(bank, torch.bfloat16), w_out(exact, torch.float32)) < 4e-3


def test_recomputed_tiles_give_the_same_bits() -> None:
    ffn, (x, dy) = tiled(activation="reglu"), inputs(12)
    ffn.mode = "sparse"
    wanted = [x, *ffn.bank.neuron_parameters().values(), ffn.router.weight]
    kept = torch.autograd.grad(ffn(x)[0], wanted, dy)
    recomputed = torch.autograd.grad(checkpoint(lambda x: ffn(x)[0], x, use_reentrant=False), wanted, dy)
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


def test_tiles_are_computed_in_one_piece_where_that_is_faster() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert tiles_pay("torch", 64, 64, cpu, torch.float32) and tiles_pay("torch", 128, 64, cpu, torch.bfloat16)
    assert not tiles_pay("torch", 32, 64, cpu, torch.float32) and not tiles_pay("torch", 64, 64, cpu, torch.bfloat16)
    assert not tiles_pay("reference", 64, 64, cpu, torch.float32)
    assert not tiles_pay("cpp", 64, 64, cpu, torch.float32) and not tiles_pay("torch", 64, 64, gpu, torch.float32)


def test_a_network_of_one_expert_size_is_the_same_by_tokens_and_by_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    ffn, (x, dy) = tiled(), inputs(12)
    whole = run_ffn(ffn, "sparse", x, dy)
    ffn.settings = replace(ffn.settings, backend="reference")
    by_token = run_ffn(ffn, "sparse", x, dy)
    assert not torch.equal(whole[1]["w_in"], by_token[1]["w_in"])  # two ways
    for name, gradient in by_token[1].items():
        assert relative_error(whole[1][name], gradient) < 1e-12, name
