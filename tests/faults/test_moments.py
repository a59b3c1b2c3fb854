"""Every moment at which a rank can be killed is a function that is there."""

import pkgutil

import pytest

from tests.faults.moments import BEFORE_GROUPS, MOMENTS, Moment


@pytest.mark.parametrize("moment", [*MOMENTS, BEFORE_GROUPS], ids=lambda moment: moment.name)
def test_the_function_of_a_moment_is_there(moment: Moment) -> None:
    assert ":" in moment.target
    assert callable(pkgutil.resolve_name(moment.target))
