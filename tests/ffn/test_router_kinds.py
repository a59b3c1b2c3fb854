"""Routers beside the centroid: what they choose, and their gradients, against brute force."""

import pytest
import torch
from torch import Tensor

from ssd_megatron.errors import ConfigError
from ssd_megatron.ffn.router_kinds import KINDS, half_keys, hashed_experts, product_scores
from ssd_megatron.ffn.routers import Router, Seen
from ssd_megatron.ffn.switchable import SwitchableFFN
from tests.ffn.helpers import PLAIN, brute_force, relative_error
from tests.ffn.test_switchable import inputs, make_ffn
from tests.ffn.test_switchable import run as run_ffn

TOKENS, BATCH = 9, 3  # of test_switchable.inputs
TOKEN_IDS = torch.randint(50, (BATCH, TOKENS), generator=torch.Generator().manual_seed(3))


def sparse(router: str, **changes: object) -> SwitchableFFN:
    ffn = make_ffn(router=router, **changes)
    ffn.mode, ffn.token_ids = "sparse", TOKEN_IDS
    return ffn


def chosen_by(ffn: SwitchableFFN, x: Tensor) -> Tensor:
    """Experts of each token [T, K], sorted, as the network counts and the kernels get them."""
    seen = ffn._seen(TOKENS, BATCH, x.device)
    return ffn.router.route(x.flatten(0, 1), seen).expert_ids_TK.sort(dim=1).values


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_runs_in_one_network_and_has_the_parameters_it_needs(name: str) -> None:
    experts = 64 if name in ("rand_hash", "vanilla") else 16
    ffn, (x, dy) = sparse(name, num_experts=experts, top_k=experts // 4), inputs()
    _, got = run_ffn(ffn, "sparse", x, dy)
    named = {leaf: tuple(p.shape) for leaf, p in ffn.router.named_parameters()}
    wanted = {
        "centroid": {"weight": (16, 16)},
        "switch": {"weight": (16, 16)},
        "pkm": {"weight": (8, 16)},
        "mlp": {"weight": (16, 16), "mix": (16, 16)},
    }
    assert named == wanted.get(name, {})
    assert ("router" in got) == (name in ("centroid", "switch", "pkm"))
    assert ffn.expert_load.sum() == TOKENS * BATCH * experts // 4
    assert got["x"].abs().sum() > 0


@pytest.mark.parametrize("name", KINDS)
def test_no_sequences_are_no_problem(name: str) -> None:
    experts = 64 if name in ("rand_hash", "vanilla") else 16
    ffn = sparse(name, num_experts=experts, top_k=4, balance_bias=name in ("centroid", "switch"), load_balance=0.1)
    ffn.token_ids = TOKEN_IDS[:0]
    x = torch.zeros(TOKENS, 0, 16, dtype=torch.float64, requires_grad=True)
    y = ffn(x)[0]
    y.sum().backward()
    assert y.shape == x.shape and ffn.expert_load.sum() == 0


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("top_k", [1, 3])
def test_switch_scales_by_its_softmax_and_has_the_brute_force_gradient(top_k: int, backend: str) -> None:
    ffn, (x, dy) = sparse("switch", top_k=top_k, backend=backend, load_balance=0.3, z_loss=0.2), inputs()
    ffn.router.loss_weight = 0.7
    y, got = run_ffn(ffn, "sparse", x, dy)
    scores_TE = x.flatten(0, 1) @ ffn.router.weight.T
    p_TE = scores_TE.softmax(dim=1)
    ids = scores_TE.topk(top_k).indices
    wanted = brute_force(x.flatten(0, 1), ids, p_TE.gather(1, ids), ffn.bank, 8)
    assert relative_error(y.flatten(0, 1), wanted) < 1e-12
    balance = 0.0
    for sequence in range(BATCH):
        mine = p_TE.view(TOKENS, BATCH, 8)[:, sequence]
        counts = ids.view(TOKENS, BATCH, top_k)[:, sequence].flatten().bincount(minlength=8)
        balance = balance + 8 * (counts / (TOKENS * top_k) * mine.mean(0)).sum() / BATCH
    z = scores_TE.exp().sum(1).log().square().mean()
    loss = (wanted * dy.flatten(0, 1)).sum() + 0.7 * (0.3 * balance + 0.2 * z)
    given = [x, *ffn.bank.neuron_parameters().values(), ffn.router.weight]
    for name, gradient in zip(got, torch.autograd.grad(loss, given), strict=True):
        assert relative_error(got[name], gradient) < 1e-6, name  # shares of the load are fp32


def test_product_keys_choose_and_learn_as_the_whole_table_of_sums_would() -> None:
    ffn, (x, dy) = sparse("pkm", num_experts=16, top_k=3), inputs()
    y, got = run_ffn(ffn, "sparse", x, dy)
    first, second = ffn.router.weight[:4], ffn.router.weight[4:]
    rows_EH = torch.stack([first[a] + second[b] for a in range(4) for b in range(4)])
    best = (x.flatten(0, 1) @ rows_EH.T).topk(3)
    p_TK = best.values.softmax(dim=1)
    wanted = brute_force(x.flatten(0, 1), best.indices, 1 + p_TK - p_TK.detach(), ffn.bank, 16)
    assert relative_error(y.flatten(0, 1), wanted) < 1e-12
    given = [x, *ffn.bank.neuron_parameters().values(), ffn.router.weight]
    for name, gradient in zip(got, torch.autograd.grad(wanted, given, dy.flatten(0, 1)), strict=True):
        assert relative_error(got[name], gradient) < 1e-12, name


def test_half_keys_are_the_nearest_whose_sums_are_the_rows() -> None:
    torch.manual_seed(0)
    first, second, x = torch.randn(3, 5), torch.randn(3, 5), torch.randn(7, 5)
    rows_EH = (first.unsqueeze(1) + second).flatten(0, 1)
    assert relative_error(product_scores(x, half_keys(rows_EH)), x @ rows_EH.T) < 1e-6
    design = torch.cat([torch.eye(3).repeat_interleave(3, 0), torch.eye(3).repeat(3, 1)], 1)  # row i is a sum of two
    other = torch.randn(9, 5)
    nearest = torch.linalg.lstsq(design, other, driver="gelsd").solution
    assert relative_error(design @ half_keys(other), design @ nearest) < 1e-5


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_oracle_takes_the_experts_whose_neurons_give_most(activation: str) -> None:
    ffn, (x, _) = sparse("oracle", activation=activation, top_k=2), inputs()
    masses = []
    for expert in range(8):
        rows = slice(8 * expert, 8 * expert + 8)
        pre = x.flatten(0, 1) @ ffn.bank.w_in[rows].T + ffn.bank.b_in[rows]
        if ffn.bank.w_gate is None:
            masses.append(pre.relu().sum(1))
        else:
            gate = x.flatten(0, 1) @ ffn.bank.w_gate[rows].T + ffn.bank.b_gate[rows]
            masses.append((torch.nn.functional.silu(gate) * pre).abs().sum(1))
    assert torch.equal(chosen_by(ffn, x), torch.stack(masses, 1).topk(2).indices.sort(dim=1).values)


def test_vanilla_takes_the_neurons_with_the_largest_pre_activations() -> None:
    ffn, (x, _) = sparse("vanilla", num_experts=64, top_k=16), inputs()
    wanted = (x.flatten(0, 1) @ ffn.bank.w_in.T + ffn.bank.b_in).topk(16).indices
    assert torch.equal(chosen_by(ffn, x), wanted.sort(dim=1).values)
    # ReLU: with as many neurons as ever fire, nothing is lost.
    fires = int((x.flatten(0, 1) @ ffn.bank.w_in.T + ffn.bank.b_in > 0).sum(1).max())
    ffn.router.top_k = fires
    y = ffn(x)[0]
    ffn.mode = "dense"
    assert relative_error(y, ffn(x)[0]) < 1e-12


def test_mlp_scores_normalised_inputs_and_starts_as_the_centroids() -> None:
    ffn, (x, _) = sparse("mlp", top_k=2), inputs()
    centroid = sparse("centroid", top_k=2)
    assert torch.equal(chosen_by(ffn, x), chosen_by(centroid, x))  # tanh and a norm do not change an order
    with torch.no_grad():
        ffn.router.mix.normal_(generator=torch.Generator().manual_seed(0))
    unit = torch.nn.functional.normalize(x.flatten(0, 1), dim=1)
    wanted = ((unit @ ffn.router.weight.T).tanh() @ ffn.router.mix.T).topk(2).indices
    assert torch.equal(chosen_by(ffn, x), wanted.sort(dim=1).values)


@pytest.mark.parametrize("name", ["hash", "rand_hash"])
def test_hashes_go_by_the_token_id_alone(name: str) -> None:
    ffn, (x, _) = sparse(name, num_experts=64, top_k=16), inputs()
    ids_TK, keys_T = chosen_by(ffn, x), TOKEN_IDS.t().flatten()
    for key in keys_T.unique():
        assert (ids_TK[keys_T == key] == ids_TK[keys_T == key][0]).all()
    assert len(ids_TK.unique(dim=0)) == len(keys_T.unique())
    assert torch.equal(chosen_by(ffn, -x), ids_TK)


def test_random_goes_by_the_position_alone() -> None:
    ffn, (x, _) = sparse("random"), inputs()
    ids = chosen_by(ffn, x).view(TOKENS, BATCH, 2)
    assert (ids == ids[:, :1]).all() and len(ids[:, 0].unique(dim=0)) > 4


def test_hashed_experts_are_distinct_even_nested_and_other_with_another_salt() -> None:
    keys_T = torch.arange(4000)
    ids_TK = hashed_experts(keys_T, 16, 4, salt=1)
    assert all(len(set(row)) == 4 for row in ids_TK.tolist())
    assert torch.equal(hashed_experts(keys_T, 16, 2, salt=1), ids_TK[:, :2])
    load_E = ids_TK.flatten().bincount(minlength=16)
    assert load_E.min() > 880 and load_E.max() < 1120  # 1000 expected, 27 its standard deviation
    same = (hashed_experts(keys_T, 16, 1, salt=2) == ids_TK[:, :1]).float().mean()
    assert 0.04 < same < 0.09  # by chance 1/16


@pytest.mark.parametrize("name", ["hash", "random", "pkm", "mlp"])
def test_kinds_that_know_experts_by_number_follow_them_wherever_they_lie(name: str) -> None:
    """The same neurons in other places, as placement puts them: the same output."""
    ffn, (x, _) = sparse(name, num_experts=16, top_k=4), inputs()
    before = ffn(x)[0]
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0)).repeat_interleave(4) * 4
    order = order + torch.arange(4).repeat(16)
    with torch.no_grad():
        for tensor in ffn.bank.neuron_parameters().values():
            tensor.copy_(tensor[order].clone())
        ffn.bank.neuron_ids.copy_(ffn.bank.neuron_ids[order].clone())
    assert relative_error(ffn(x)[0], before) < 1e-12


@pytest.mark.parametrize("name", ["centroid", "switch"])
def test_a_bias_enters_the_choice_alone_and_falls_while_its_expert_is_busy(name: str) -> None:
    ffn, (x, dy) = sparse(name, balance_bias=True), inputs()
    plain = sparse(name)
    assert torch.equal(ffn(x)[0], plain(x)[0])  # biases begin at 0
    with torch.no_grad():
        ffn.router.bias[3] = 100.0
    ffn.router.loss_weight = 0.5
    y = ffn(x)[0]
    assert ffn.expert_load[3] == TOKENS * BATCH
    gates = ffn.router.route(x.flatten(0, 1)).gates_TK
    assert gates.max() <= 1 and gates.min() > 0
    (gradient,) = torch.autograd.grad(y, ffn.router.bias, dy)
    wanted = 1e-3 * 0.5 * (ffn.expert_load / (TOKENS * BATCH) - 2 / 8)
    assert relative_error(gradient, wanted) < 1e-6
    assert gradient[3] > 0 > gradient.sum() - gradient[3]


def test_what_a_kind_needs_and_does_not_get_is_told() -> None:
    for name in ("avg_k", "oracle", "hash", "random", "mlp"):
        with pytest.raises(AssertionError, match=name):
            Router(16, 8, 2, "frozen", kind=name).route(torch.randn(4, 16), Seen())
    with pytest.raises(ConfigError, match=r"balance_bias \(True\) needs a router that .*, not mlp: use switch"):
        Router(16, 8, 2, "straight_through", kind="mlp", balance_bias=True)
