"""Which layouts are possible, which fit, and which come first."""

import pytest

from ssd_megatron.config.schema import PhaseConfig, TrainingConfig
from ssd_megatron.errors import ConfigError
from ssd_megatron.model.memory import Layout
from ssd_megatron.planning.recommend import divisors, layouts, plan, recommend, sparse_share
from tests.planning.helpers import cluster, job, ssd


def test_every_layout_divides_what_it_splits() -> None:
    found = list(layouts(job(gpus=16, batch=64)))
    assert len(found) == len(set(found)) > 50
    for layout in found:
        assert layout.ranks == 16 and layout.batch == 64
        assert 4 % layout.tensor == 0 and 4 % layout.pipeline == 0 and layout.data % layout.expert == 0
        assert 16 % layout.homes == 0 and layout.microbatches >= layout.pipeline
        assert layout.zero_stage == 1 or layout.pipeline == 1
    assert {layout.tensor for layout in found} == {1, 2, 4}


def test_dense_weights_are_gathered_once_a_step_where_that_can_be() -> None:
    once = [layout for layout in layouts(job()) if layout.gather_once]
    assert once and all(layout.expert > 1 and layout.zero_stage == 1 for layout in once)
    assert not [layout for layout in layouts(job(ssd=ssd(schedule="sparse"))) if layout.gather_once]


def test_query_groups_limit_tensor_parallelism() -> None:
    assert {layout.tensor for layout in layouts(job(num_query_groups=2))} == {1, 2}


def test_tensor_parallelism_stays_within_a_node() -> None:
    found = layouts(job(in_cluster=cluster(16, gpus_per_node=2)))
    assert max(layout.tensor for layout in found) == 2


def test_plans_are_sorted_by_the_mean_over_dense_and_sparse_steps() -> None:
    plans = recommend(job())
    means = [float(f"{p.mean_seconds:.3g}") for p in plans]
    assert means == sorted(means)
    sizes = [(p.layout.tensor, p.layout.pipeline, p.layout.expert) for p in plans]
    assert len(sizes) == len(set(sizes)) > 5
    best = plans[0]
    assert best.mean_seconds == pytest.approx((best.seconds["dense"].total + best.seconds["sparse"].total) / 2)
    assert all(p.fits for p in plans)


def test_only_layouts_that_fit_are_recommended() -> None:
    sizes = {"hidden_size": 8192, "num_attention_heads": 64, "ffn_hidden_size": 32768, "num_layers": 64}
    plans = recommend(job(**sizes))
    # 52B parameters, 104 GB in bf16: no rank can hold all of them, though banks may be split over expert ranks only.
    assert len(plans) > 3 and all(p.fits for p in plans)
    assert min(p.layout.homes * p.layout.pipeline for p in plans) > 1


def test_a_model_that_is_too_large_is_refused_with_the_least_it_needs() -> None:
    sizes = {"hidden_size": 8192, "num_attention_heads": 64, "ffn_hidden_size": 32768, "num_layers": 64}
    with pytest.raises(ConfigError, match=r"no layout fits into the 90.0 GiB .* needs \d+\.\d GiB: use more GPUs"):
        recommend(job(gpus=4, **sizes))


def test_a_batch_that_no_layout_divides_is_refused_with_one_that_works() -> None:
    with pytest.raises(ConfigError, match=r"train_batch_size \(7\) .* try train_batch_size 112"):
        recommend(job(batch=7, num_layers=3, num_attention_heads=1, hidden_size=63))


def test_runs_without_sparse_steps_plan_none() -> None:
    dense = plan(job(ssd=ssd(schedule="dense")), Layout(data=16, microbatches=4))
    assert list(dense.seconds) == ["dense"] and dense.switch is None
    assert dense.mean_seconds == dense.seconds["dense"].total
    assert 0 < (dense.mfu or 0) < 0.5


def test_shares_of_sparse_steps() -> None:
    assert sparse_share(job(ssd=ssd(sparse_fraction=0.3)).config) == 0.3
    assert sparse_share(job(ssd=ssd(schedule="sparse")).config) == 1.0
    phases = tuple(PhaseConfig(start_step=s, mode=m) for s, m in ((1, "dense"), (21, "sparse"), (61, "dense")))
    fixed = job(ssd=ssd(schedule="fixed", phases=phases), training=TrainingConfig(train_steps=100))
    assert sparse_share(fixed.config) == pytest.approx(0.4)
    short = job(ssd=ssd(schedule="fixed", phases=phases), training=TrainingConfig(train_steps=41))
    assert sparse_share(short.config) == pytest.approx(21 / 41)


def test_divisors() -> None:
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
