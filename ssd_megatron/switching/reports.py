"""What the coordinator tells of what it saw and did; numbers by layer are of all stages."""

from dataclasses import dataclass

from ssd_megatron.config.schema import Mode


@dataclass(frozen=True)
class CheckReport:
    """One look at the activation pattern.

    Attributes:
        similarity: structure similarity to the look before, mean over layers (adjusted Rand index); None at the first.
        overlap: share of a probe token's experts that it also had at the look before; None at the first after a switch.
        active_fraction: share of firing neurons by layer.
        stable: similar looks in a row, this one included.
    """

    similarity: float | None
    similarity_layers: list[float]
    overlap: float | None
    active_fraction: list[float]
    seconds: float
    stable: int = 0

    @property
    def agreement(self) -> float | None:
        """What ssd.similarity_threshold is held against: neurons stay together *and* tokens keep their experts."""
        if self.similarity is None or self.overlap is None:
            return None
        return min(self.similarity, self.overlap)


@dataclass(frozen=True)
class PlacementReport:
    """Experts that moved to other homes inside a sparse phase.

    Attributes:
        imbalance_before, imbalance_after: tokens of the busiest home over the mean, worst layer.
    """

    seconds: float
    bytes_moved: int
    imbalance_before: float
    imbalance_after: float


@dataclass(frozen=True)
class SwitchReport:
    """A switch that is done and verified.

    Attributes:
        loss_before, loss_after, loss_sparse: of the probe batch: dense before and after, sparse after.
        similarity: structure similarity by layer of the new partition to the labels known before.
        top_k: experts that a token computes in each layer.
        imbalance_before, imbalance_after: tokens of the busiest home over the mean on the probe batch, worst layer,
            with the experts as clustered and as placed; None with a single home.
    """

    from_mode: Mode
    to_mode: Mode
    reason: str
    seconds: float
    seconds_statistics: float
    seconds_cluster: float
    seconds_transfer: float
    seconds_verify: float
    bytes_moved: int
    loss_before: float
    loss_after: float
    loss_sparse: float
    similarity: list[float]
    top_k: list[int]
    imbalance_before: float | None
    imbalance_after: float | None
