import pytest

from ssd_megatron.config.batch import Batch, check_loss_chunk, largest_divisor, resolve_batch
from ssd_megatron.errors import ConfigError


@pytest.mark.parametrize(
    ("train", "micro", "accumulation", "ranks", "limit", "expected"),
    [
        (32, "auto", "auto", 1, 64, Batch(32, 32, 1)),
        (32, "auto", "auto", 1, 12, Batch(32, 8, 4)),
        (30, "auto", "auto", 2, 4, Batch(30, 3, 5)),
        (32, "auto", "auto", 4, 0, Batch(32, 1, 8)),
        (32, 4, "auto", 2, 64, Batch(32, 4, 4)),
        (32, "auto", 4, 2, 1, Batch(32, 4, 4)),
        (32, 8, 2, 2, 1, Batch(32, 8, 2)),
        ("auto", 8, 2, 2, 1, Batch(32, 8, 2)),
        ("auto", 8, "auto", 2, 1, Batch(16, 8, 1)),
    ],
)
def test_auto_follows_from_the_rest(
    train: int, micro: int, accumulation: int, ranks: int, limit: int, expected: Batch
) -> None:
    batch = resolve_batch(train, micro, accumulation, ranks, limit)
    assert batch == expected
    assert batch.train == batch.micro * batch.accumulation * ranks


def test_contradiction_shows_the_arithmetic() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_batch(32, 3, 4, 2, 64)
    assert str(caught.value) == (
        "train_batch_size (32) must be train_micro_batch_size_per_gpu (3) * gradient_accumulation_steps (4) * data "
        "parallel size (2) = 24: try train_batch_size 24, or train_micro_batch_size_per_gpu 2, "
        'gradient_accumulation_steps "auto"'
    )


def test_fewer_samples_than_ranks_suggests_one_each() -> None:
    with pytest.raises(ConfigError, match=r"train_batch_size \(3\) must be a multiple .* try 4$"):
        resolve_batch(3, "auto", "auto", 4, 64)


@pytest.mark.parametrize(("number", "limit", "expected"), [(12, 5, 4), (13, 12, 1), (8, 100, 8), (8, 0, 1)])
def test_largest_divisor(number: int, limit: int, expected: int) -> None:
    assert largest_divisor(number, limit) == expected


def test_a_chunk_of_a_microbatch_is_smaller_than_it() -> None:
    assert not [*check_loss_chunk(None, 64), *check_loss_chunk(63, 64)]
    assert list(check_loss_chunk(64, 64)) == [
        "training.loss_chunk_tokens (64) has no effect on microbatches with logits of 64 tokens: leave it out, or try 8"
    ]
