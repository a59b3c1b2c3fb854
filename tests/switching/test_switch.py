"""A switch moves everything that belongs to a neuron, and verification sees every fault that sums and losses cannot."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ssd_megatron.parallel.logical_state import LogicalState
from ssd_megatron.parallel.topology import Topology
from ssd_megatron.parallel.zero import EXP_AVG, EXP_AVG_SQ, KINDS, MASTER
from ssd_megatron.switching import switch
from ssd_megatron.switching.networks import Networks
from ssd_megatron.switching.partition import random_partition
from tests.layouts import DP2, EP2, EP2_DP2, ONE, PP2_EP2, TP2, TP2_EP2, TP2_PP2_EP2, Layout, zero2
from tests.ranks import run_ranks
from tests.small_engine import build, make_coordinator, random_batch, run_config, train_steps

NEURONS, EXPERTS = 64, 8
DP3 = Layout(data=3)
# Layout, bf16, activation
CASES = [
    *((ONE, bf16, activation) for bf16 in (False, True) for activation in ("relu", "reglu")),
    *((layout, False, "relu") for layout in (DP2, DP3, TP2, EP2, zero2(TP2_EP2), PP2_EP2, EP2_DP2)),
    *((layout, False, "reglu") for layout in (DP3, TP2_EP2, zero2(EP2_DP2))),
    *((layout, True, "relu") for layout in (zero2(DP2), zero2(TP2), zero2(EP2), TP2_EP2, TP2_PP2_EP2)),
    *((layout, True, "reglu") for layout in (DP3, PP2_EP2, zero2(EP2_DP2))),
]


def labels_for(names: list[str], seed: int) -> dict[str, Tensor]:
    return {name: random_partition(NEURONS, EXPERTS, seed + index).labels for index, name in enumerate(names)}


def switch_and_compare(topology: Topology, layout: Layout, bf16: bool, activation: str) -> int:
    """Two switches with training between; every neuron keeps its rows, the model its dense loss."""
    config = run_config(
        topology.world.size,
        parallel=layout.parallel.model_dump(),
        stage=layout.stage,
        bf16=bf16,
        activation=activation,
    )
    model, engine = build(topology, config)
    state, batch = engine.state, random_batch(config, 99)
    moved = 0
    for seed in (0, 10):
        train_steps(engine, config, range(seed, seed + 2))
        before = {
            (name, leaf, kind): state.read(f"{name}.bank.{leaf}", kind)
            for name, ffn in model.ffns.items()
            for leaf in ffn.bank.neuron_parameters()
            for kind in KINDS
        }
        ids = {name: ffn.bank.neuron_ids.clone() for name, ffn in model.ffns.items()}
        loss = engine.mean_loss([batch])
        networks = Networks(list(model.ffns), model.ffns, topology)
        applied = switch.regroup_neurons(networks, labels_for(list(model.ffns), seed), EXPERTS, state)
        switch.set_routers(networks, EXPERTS, state)
        moved += applied.bytes_moved
        for (name, leaf, kind), old in before.items():
            new_ids = model.ffns[name].bank.neuron_ids
            position_before = torch.argsort(ids[name])[new_ids]
            assert torch.equal(state.read(f"{name}.bank.{leaf}", kind), old[position_before]), (name, leaf, kind)
        assert engine.mean_loss([batch]) == pytest.approx(loss, rel=2e-3 if bf16 else 1e-6)
        for name in model.ffns:
            assert state.read(f"{name}.router.weight", MASTER).norm() > 0
            assert not state.read(f"{name}.router.weight", EXP_AVG).any()
        assert state.adam_steps()["router"] == 0 and state.adam_steps()["decay"] > 0
    return moved


@pytest.mark.parametrize(
    ("layout", "bf16", "activation"),
    CASES,
    ids=[f"{layout}, {'bf16' if bf16 else 'fp32'}, {a}" for layout, bf16, a in CASES],
)
def test_neurons_keep_weights_and_moments(layout: Layout, bf16: bool, activation: str) -> None:
    moved = run_ranks(layout.ranks, switch_and_compare, layout, bf16, activation, parallel=layout.parallel)
    # With one home and three ranks a cut of ZeRO's falls into a bank, with two it does not.
    assert (min(moved) > 0) == (layout.homes > 1 or layout.data == 3)


Fault = Callable[[LogicalState, str], None]


def forget_a_moment(state: LogicalState, name: str) -> None:
    """As if exp_avg had not been moved: undo its move by any other order."""
    fragment = state.fragment(f"{name}.bank.w_in", EXP_AVG)
    fragment.values.copy_(fragment.values.view(NEURONS, -1).flip(0).flatten())


def move_a_moment_by_another_order(state: LogicalState, name: str) -> None:
    fragment = state.fragment(f"{name}.bank.w_out", EXP_AVG_SQ)
    rows = fragment.values.view(NEURONS, -1)
    rows[[3, 4]] = rows[[4, 3]]


def leave_the_master(state: LogicalState, name: str) -> None:
    """The model's parameter moved, its master did not."""
    parameter = state.parameter(f"{name}.bank.w_in").data
    parameter.copy_(parameter.flip(0))


def swap_two_columns(state: LogicalState, name: str) -> None:
    fragment = state.fragment(f"{name}.bank.w_in", EXP_AVG)
    rows = fragment.values.view(NEURONS, -1)
    rows[5, [0, 1]] = rows[5, [1, 0]]


def exchange_the_moments(state: LogicalState, name: str) -> None:
    first, second = (state.fragment(f"{name}.bank.b_in", kind).values for kind in (EXP_AVG, EXP_AVG_SQ))
    first[0], second[0] = second[0].clone(), first[0].clone()


FAULTS: dict[str, tuple[Fault, str]] = {
    "moment not moved": (forget_a_moment, "neurons do not have the weights and moments"),
    "moment moved by another order": (move_a_moment_by_another_order, "2 of 64 neurons do not have"),
    "master not moved": (leave_the_master, "the model's parameters are not their fp32 masters"),
    "columns of a moment exchanged": (swap_two_columns, "1 of 64 neurons do not have"),
    "moments exchanged": (exchange_the_moments, "1 of 64 neurons do not have"),
}


def plant(topology: Topology, fault: str) -> tuple[str, float, float]:
    """The message of the failed verification; dense loss and sum of all moments with the fault, relative to before."""
    config = run_config()
    model, engine = build(topology, config)
    train_steps(engine, config, range(2))
    name, ffn = next(iter(model.ffns.items()))
    names = switch.neuron_tensor_names(name, ffn)
    fingerprints = switch.bank_fingerprints(engine.state, names, topology.stage)
    expected = switch.fingerprints_by_identity(ffn, fingerprints)
    batch = random_batch(config, 99)

    def evidence() -> tuple[float, float]:
        moments = sum(
            float(engine.state.read(n, kind).sum(dtype=torch.float64)) for n in names for kind in (EXP_AVG, EXP_AVG_SQ)
        )
        return engine.mean_loss([batch]), moments

    switch.verify_bank(name, ffn, expected, engine.state, topology)
    loss, moments = evidence()
    FAULTS[fault][0](engine.state, name)
    faulty_loss, faulty_moments = evidence()
    with pytest.raises(switch.SwitchError) as error:
        switch.verify_bank(name, ffn, expected, engine.state, topology)
    return str(error.value), faulty_loss / loss, faulty_moments / moments


def plant_in_a_copy(topology: Topology) -> str:
    """Rank 0 computes with other parameters than the masters that rank 1 owns."""
    config = run_config(2)
    model, engine = build(topology, config)
    train_steps(engine, config, range(2))
    name, ffn = next(iter(model.ffns.items()))
    names = switch.neuron_tensor_names(name, ffn)
    fingerprints = switch.bank_fingerprints(engine.state, names, topology.stage)
    expected = switch.fingerprints_by_identity(ffn, fingerprints)
    switch.verify_bank(name, ffn, expected, engine.state, topology)
    for leaf in names:
        part = next((part for part in engine.state.owners(leaf) if part.rank == 1), None)
        if part is not None and topology.is_first:
            ffn.get_parameter(leaf.removeprefix(f"{name}.")).data.view(-1)[part.start] += 1
    with pytest.raises(switch.SwitchError) as error:
        switch.verify_bank(name, ffn, expected, engine.state, topology)
    return str(error.value)


def test_verification_catches_parameters_that_are_stale_in_a_copy() -> None:
    for message in run_ranks(2, plant_in_a_copy):
        assert message.endswith("the model's parameters are not their fp32 masters after a switch on all ranks alike")


@pytest.mark.parametrize("fault", FAULTS)
def test_verification_catches(fault: str) -> None:
    message, loss, moments = run_ranks(1, plant, fault)[0]
    assert FAULTS[fault][1] in message
    if fault != "master not moved":
        assert loss == 1.0 and moments == pytest.approx(1.0, rel=1e-6)  # which neither loss nor sums would have seen


def router_rates(topology: Topology) -> list[tuple[float, float]]:
    """Learning rates of routers and matrices in a dense step and in the first sparse one, with a scheduler that does
    not move between them, as after a step that was skipped."""
    config = run_config(phases=[(1, "dense"), (2, "sparse")])
    model, engine = build(topology, config)
    coordinator = make_coordinator(topology, config, model, engine)
    engine.state.set_learning_rate("decay", 0.25)
    rates = []
    for step in (1, 2):
        coordinator.before_step(step)
        rates.append((engine.state.learning_rates()["router"], engine.state.learning_rates()["decay"]))
    return rates


def overlaps_of_single_neurons(topology: Topology) -> list[float | None]:
    """Of three checks without training between, of 65,536 experts: more than 16 bits hold."""
    neurons = 2**16
    ssd = {"router": "vanilla", "num_experts": neurons, "top_k": 4, "check_interval": 1}
    config = run_config(num_layers=1, hidden_size=4, ffn_hidden_size=neurons, ssd=ssd)
    model, engine = build(topology, config)
    coordinator = make_coordinator(topology, config, model, engine)
    reports = [coordinator.after_step(step, 1.0) for step in (1, 2, 3)]
    assert max(int(ids.max()) for ids in coordinator._expert_ids.values()) >= 2**15
    return [report.overlap for report in reports if report is not None]


def test_checks_follow_any_number_of_experts() -> None:
    assert run_ranks(1, overlaps_of_single_neurons) == [[None, 1.0, 1.0]]


def test_routers_learn_from_the_first_sparse_step_on_also_after_a_skipped_one() -> None:
    assert run_ranks(1, router_rates)[0] == [(0.0, 0.25), (0.25, 0.25)]
