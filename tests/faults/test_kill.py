"""A rank is killed at moments that matter; `make test-faults` strikes at all of them, on every layout."""

from pathlib import Path

import pytest

from tests.faults.kill import Case, Undisturbed, run_case
from tests.faults.moments import Fault


@pytest.mark.parametrize(
    ("layout", "async_save", "faults", "steps"),
    [
        ("TP2", False, [Fault("switch: part of a bank moved", 1, 12)], [2]),
        ("TP2", False, [Fault("switch: in verification", 0, 3)], [8]),
        ("PP2", True, [Fault("save: half a file", 1, 3)], [4]),
        ("PP2", False, [Fault("save: index written, not renamed", 0, 4)], [6]),
        ("PP2", False, [Fault("in an evaluation", 1, 2)], [6]),
        (
            "TP2",
            False,
            [Fault("before Adam's step", 1, 7), Fault("restore: reading tensors", 1)],
            [6, 6],
        ),
    ],
    ids=["moving", "verifying", "writing", "renaming", "evaluating", "restoring"],
)
def test_a_killed_job_goes_on_from_its_newest_checkpoint_and_ends_alike(
    undisturbed: Undisturbed, tmp_path: Path, layout: str, async_save: bool, faults: list[Fault], steps: list[int]
) -> None:
    case = Case(layout, 1, async_save, tuple(faults), "alone")
    restarts = run_case(case, tmp_path / "job", undisturbed.job(layout, 1))
    assert [restart.step for restart in restarts] == steps
