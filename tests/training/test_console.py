import sys

import pytest

from ssd_megatron.training.console import Console, StepLine, format_seconds, short_number


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def able_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests run in may be a dumb one."""
    monkeypatch.setenv("TERM", "xterm")


def line(step: int, seconds: float = 1.0, mode: str = "dense", mfu: float | None = None) -> StepLine:
    return StepLine(step=step, loss=3.14159, mode=mode, tokens_per_second=12345.6, tflops=0.5, seconds=seconds, mfu=mfu)


def run_steps(console: Console, clock: Clock, steps: list[StepLine]) -> None:
    for step in steps:
        clock.now += step.seconds
        console.step(step)


def test_without_a_terminal_lines_are_plain_and_come_every_log_interval(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    console = Console(25, log_interval=10, clock=clock)  # pytest's stdout is no terminal
    run_steps(console, clock, [line(step) for step in range(1, 26)])
    console.close()
    assert capsys.readouterr().out.splitlines() == [
        "step 10/25  dense   loss 3.1416  12.3k tokens/s  ETA 0:00:15  0.5 TFLOP/s",
        "step 20/25  dense   loss 3.1416  12.3k tokens/s  ETA 0:00:05  0.5 TFLOP/s",
        "step 25/25  dense   loss 3.1416  12.3k tokens/s  ETA 0:00:00  0.5 TFLOP/s",
    ]


def test_without_a_terminal_nothing_is_an_escape_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes this for a terminal
    console = Console(1, log_interval=1)
    console.event("step 1: switch [dense] -> [sparse]")
    console.note("numactl is absent")
    console.step(line(1, mfu=0.412))
    console.close()
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\r" not in out
    assert out.splitlines()[:2] == ["step 1: switch [dense] -> [sparse]", "note: numactl is absent"]
    assert "MFU 41.2%" in out


def test_a_long_event_stays_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for is_terminal in (False, True):
        console = Console(1, is_terminal=is_terminal, log_interval=1)
        console.event("word " * 100)
        console.close()
        assert "word " * 100 in capsys.readouterr().out


def test_on_a_terminal_one_line_is_updated_and_events_stand_above_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    clock = Clock()
    console = Console(3, is_terminal=True, log_interval=1, clock=clock)
    run_steps(console, clock, [line(1), line(2)])
    console.event("switch [bold]dense -> sparse")  # not markup
    run_steps(console, clock, [line(3, mode="sparse")])
    console.close()
    out = capsys.readouterr().out
    assert "\x1b[2K" in out  # erased and drawn again in place
    assert out.index("step 2/3") < out.index("switch [bold]dense -> sparse") < out.index("step 3/3  sparse")
    last = out[out.index("step 3/3") :]
    assert "\n" in last and "loss 3.1416  12.3k tokens/s  ETA 0:00:00  0.5 TFLOP/s" in last


def test_fast_steps_are_not_all_drawn_but_the_last_is(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    console = Console(1000, is_terminal=True, log_interval=1, clock=clock)
    run_steps(console, clock, [line(step, seconds=0.001) for step in range(1, 1001)])
    console.close()
    out = capsys.readouterr().out
    drawn = {number for number in range(1, 1001) if f"step {number}/1000" in out}
    assert 5 <= len(drawn) <= 15 and 1000 in drawn


def test_what_others_print_while_the_line_stands_is_not_lost(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(2, is_terminal=True, log_interval=1)
    console.step(line(1))
    print("from a library")
    console.close()
    print("afterwards", file=sys.stdout)
    assert "from a library" in (out := capsys.readouterr().out) and out.endswith("afterwards\n")


def eta_after(capsys: pytest.CaptureFixture[str], steps: list[StepLine], pause: float = 0.0) -> str:
    clock = Clock()
    console = Console(100, log_interval=steps[-1].step, clock=clock)
    clock.now += 1000  # building the model is no sign of how long a step takes
    run_steps(console, clock, steps[:-1])
    clock.now += pause
    run_steps(console, clock, steps[-1:])
    return capsys.readouterr().out.rpartition("ETA ")[2].split()[0]


def test_eta_knows_that_modes_differ_in_speed(capsys: pytest.CaptureFixture[str]) -> None:
    dense = [line(step, seconds=4.0) for step in range(1, 31)]
    sparse = [line(step, seconds=1.0, mode="sparse") for step in range(31, 41)]
    # 60 steps left, three quarters of them dense: 45 * 4 + 15 * 1 seconds.
    assert eta_after(capsys, dense + sparse) == "0:03:15"


def test_eta_counts_the_time_between_steps(capsys: pytest.CaptureFixture[str]) -> None:
    steps = [line(step, seconds=1.0) for step in range(1, 51)]
    assert eta_after(capsys, steps) == "0:00:50"
    assert eta_after(capsys, steps, pause=25.0) == "0:01:15"


def test_eta_follows_a_change_of_speed(capsys: pytest.CaptureFixture[str]) -> None:
    # Within a minute it is nearer the new 10 s than the old 1 s a step; a mean over the run would say 3:33.
    steps = [line(step, seconds=1.0) for step in range(1, 31)] + [line(step, seconds=10.0) for step in range(31, 51)]
    minutes = int(eta_after(capsys, steps).split(":")[1])
    assert 5 <= minutes <= 8


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.25, "0.25"),
        (999, "999"),
        (1000, "1k"),
        (12345.6, "12.3k"),
        (999.6, "1k"),
        (2.5e21, "2.5Z"),
        (1e27, "1e+03Y"),
    ],
)
def test_short_number(value: float, text: str) -> None:
    assert short_number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (3723, "1:02:03"), (90000, "1d 1:00:00")]
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
