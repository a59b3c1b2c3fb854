"""Which step is dense and which is sparse. The schedule knows its phase from the step and its recorded decisions alone,
so a resumed run goes on exactly as the run that was not stopped.

The papers publish no rule for when to switch; these rules are ours (docs/architecture.md).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ssd_megatron.config.schema import Mode, SSDConfig


@dataclass(frozen=True)
class Decision:
    """From `step` on, train in `mode`, because of `reason`."""

    step: int
    mode: Mode
    reason: str


@dataclass(frozen=True)
class PhaseSpan:
    """Steps start_step..end_step (both included) in one mode."""

    start_step: int
    end_step: int
    mode: Mode


class Schedule:
    """Phases of a run of `train_steps` steps (the first is 1).

    `adaptive`: dense for warmup_fraction of the steps; once `stable_checks` checks in a row are similar, sparse for
    sparse_phase_fraction of the steps or what is left of sparse_fraction, whichever is less, but not for less than
    min_dense_steps; then dense for at least min_dense_steps until stable again; dense for the last
    final_dense_fraction.
    """

    def __init__(self, ssd: SSDConfig, train_steps: int) -> None:
        self._ssd = ssd
        self._train_steps = train_steps
        self._stable = 0
        if ssd.schedule == "fixed":
            assert ssd.phases is not None
            self._decisions = [Decision(p.start_step, p.mode, "schedule fixed") for p in ssd.phases]
        else:
            first: Mode = "sparse" if ssd.schedule == "sparse" else "dense"
            self._decisions = [Decision(1, first, f"schedule {ssd.schedule}")]

    @property
    def decisions(self) -> tuple[Decision, ...]:
        return tuple(self._decisions)

    def decision(self, step: int) -> Decision:
        """The decision in force at `step`."""
        return next(d for d in reversed(self._decisions) if d.step <= step)

    def mode(self, step: int) -> Mode:
        return self.decision(step).mode

    def sparse_steps(self, until: int) -> int:
        """Sparse steps among steps 1..until."""
        return sum(p.end_step - p.start_step + 1 for p in self.phases(until) if p.mode == "sparse")

    def phases(self, until: int) -> list[PhaseSpan]:
        """The phases of steps 1..until."""
        return phases_until(self._decisions, until)

    def after_step(self, step: int, *, similarity: float | None = None, spike: bool = False) -> int:
        """Decide the mode of step + 1, once step is done. Returns the similar checks in a row that it was decided on.

        Args:
            similarity: of a check made after `step` to the one before; None if there was none to compare.
            spike: the loss rose after a switch and the run shall go back to dense.
        """
        if self._ssd.schedule != "adaptive":
            return 0
        current = self.decision(step)
        if similarity is not None and current.mode == "dense":
            self._stable = self._stable + 1 if similarity >= self._ssd.similarity_threshold else 0
        stable = self._stable
        if current.mode == "sparse":
            if spike:
                self._decide(step + 1, "dense", "the loss rose after the switch")
            elif step + 1 >= current.step + self._phase_length(current.step - 1):
                self._decide(step + 1, "dense", "the sparse phase has its length")
        elif self._may_go_sparse(step, current):
            self._decide(step + 1, "sparse", f"{stable} similar checks in a row")
        return stable

    def state_dict(self) -> dict[str, object]:
        """What a checkpoint keeps, ready for JSON."""
        return {"decisions": [asdict(decision) for decision in self._decisions], "stable": self._stable}

    def load_state_dict(self, state: dict[str, object]) -> None:
        decisions, stable = state["decisions"], state["stable"]
        assert isinstance(decisions, list) and isinstance(stable, int)
        self._decisions = [Decision(**decision) for decision in decisions]
        self._stable = stable

    def _decide(self, step: int, mode: Mode, reason: str) -> None:
        self._decisions.append(Decision(step, mode, reason))
        self._stable = 0

    def _phase_length(self, before: int) -> int:
        """Length of a sparse phase that starts after step `before`: its share, what is left of the budget, and of the
        steps before the final dense part."""
        steps, ssd = self._train_steps, self._ssd
        share = round(ssd.sparse_phase_fraction * steps)
        budget = round(ssd.sparse_fraction * steps) - self.sparse_steps(before)
        room = steps - round(ssd.final_dense_fraction * steps) - before
        return min(share, budget, room)

    def _may_go_sparse(self, step: int, current: Decision) -> bool:
        warm = step >= round(self._ssd.warmup_fraction * self._train_steps)
        rested = current.step == 1 or step + 1 - current.step >= self._ssd.min_dense_steps
        stable = self._stable >= self._ssd.stable_checks
        # What is left of the share may be a few steps, which are not worth a switch.
        worth = min(self._ssd.min_dense_steps, max(1, round(self._ssd.sparse_phase_fraction * self._train_steps)))
        return warm and rested and stable and self._phase_length(step) >= worth


def phases_until(decisions: Sequence[Decision], until: int) -> list[PhaseSpan]:
    """The phases of steps 1..until that decisions, in order, have made; none of a run that has not begun."""
    begun = [d for d in decisions if d.step <= until]
    if not begun:
        return []
    ends = [d.step - 1 for d in begun[1:]] + [until]
    return [PhaseSpan(d.step, end, d.mode) for d, end in zip(begun, ends, strict=True)]
