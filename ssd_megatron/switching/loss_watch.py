"""Watches the training loss after a switch."""

from collections import deque

# Steps before a switch whose mean loss is the level, steps after it that are watched, and spikes in a row that count.
LOSS_WINDOW, WATCHED_STEPS, SPIKES_IN_A_ROW = 20, 50, 3


class LossWatch:
    """Says when the loss stays above `factor` times its level before the last switch."""

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._losses: deque[float] = deque(maxlen=LOSS_WINDOW)
        self._level: float | None = None
        self._spikes = 0

    def switched(self) -> None:
        """A switch has just been made: what was seen so far is the level."""
        self._level = sum(self._losses) / len(self._losses) if self._losses else None
        self._losses.clear()
        self._spikes = 0

    def step(self, loss: float, steps_since_switch: int) -> bool:
        """Take in a step's loss. True while it is too high for SPIKES_IN_A_ROW steps and more."""
        self._losses.append(loss)
        if not self.is_watching(steps_since_switch):
            self._spikes = 0
            return False
        assert self._level is not None
        self._spikes = self._spikes + 1 if loss > self._factor * self._level else 0
        return self._spikes >= SPIKES_IN_A_ROW

    def is_watching(self, steps_since_switch: int) -> bool:
        """Whether a loss this many steps after the last switch can count as a spike."""
        return self._level is not None and steps_since_switch <= WATCHED_STEPS

    @property
    def spiking(self) -> bool:
        """The loss has just become too high for SPIKES_IN_A_ROW steps in a row."""
        return self._spikes == SPIKES_IN_A_ROW

    def state_dict(self) -> dict[str, object]:
        """What a checkpoint keeps, ready for JSON."""
        return {"losses": list(self._losses), "level": self._level, "spikes": self._spikes}

    def load_state_dict(self, state: dict[str, object]) -> None:
        losses, level, spikes = state["losses"], state["level"], state["spikes"]
        assert isinstance(losses, list) and (level is None or isinstance(level, float)) and isinstance(spikes, int)
        self._losses = deque(losses, maxlen=LOSS_WINDOW)
        self._level, self._spikes = level, spikes
