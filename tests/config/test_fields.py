import pytest

from ssd_megatron.config.check_list import divisors_near
from ssd_megatron.config.fields import split_blend


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (("a",), (["a"], None)),
        (("a", "b"), (["a", "b"], None)),
        ((0.7, "a", 3, "b"), (["a", "b"], [0.7, 3.0])),
    ],
)
def test_blend_is_split_into_paths_and_weights(entries: tuple[str | float, ...], expected: object) -> None:
    assert split_blend(entries) == expected


@pytest.mark.parametrize("entries", [(), (0.5,), ("a", 0.5), (0.5, "a", "b"), (-1.0, "a"), (1, 2)])
def test_broken_blend_is_refused(entries: tuple[str | float, ...]) -> None:
    with pytest.raises(ValueError, match="positive weights and paths in turn"):
        split_blend(entries)


@pytest.mark.parametrize(
    ("number", "wanted", "expected"), [(2048, 48, "32 or 64"), (7, 3, "1 or 7"), (64, 100, "64"), (36, 5, "4 or 6")]
)
def test_divisors_near(number: int, wanted: int, expected: str) -> None:
    assert divisors_near(number, wanted) == expected
