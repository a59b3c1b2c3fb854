"""examples/selfcheck on two real ranks: it finds every layout good, and a planted fault in the one that has it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import free_port, rank_environment

SCRIPT = Path(__file__).parents[2] / "examples" / "selfcheck" / "selfcheck.py"
RUN = f"import runpy; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
# Gradients of what enters a tensor-parallel region are not summed over its ranks.
FAULT = """
from ssd_megatron.parallel import regions
regions._Enter.backward = staticmethod(lambda ctx, gradient: (gradient, None))
"""


def selfcheck(before: str = "") -> tuple[int, str]:
    """Exit status of rank 0 and what it printed."""
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", before + RUN],
            env=os.environ | rank_environment(rank, 2, port) | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=400)[0] for rank in ranks]
    return ranks[0].returncode, outputs[0]


@pytest.mark.parametrize("fault", ["", FAULT], ids=["good", "a planted fault"])
def test_every_layout_has_its_verdict(fault: str) -> None:
    code, output = selfcheck(fault)
    verdicts = {line.partition(":")[0]: line.rpartition(": ")[2] for line in output.splitlines() if "differ by" in line}
    expected = {
        "TP 1 x PP 1 x EP 1, ZeRO 1": "ok",
        "TP 1 x PP 1 x EP 1, ZeRO 2": "ok",
        "TP 2 x PP 1 x EP 1, ZeRO 1": "WRONG" if fault else "ok",
        "TP 1 x PP 2 x EP 1, ZeRO 1": "ok",
        "TP 1 x PP 1 x EP 2, ZeRO 1": "ok",
    }
    assert verdicts == expected, output
    assert code == (1 if fault else 0)
