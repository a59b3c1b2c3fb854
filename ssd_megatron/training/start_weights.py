"""The weights that a new run starts from, where `checkpoint.start_from` names a checkpoint of another run or model."""

from ssd_megatron.config.load import RunConfig
from ssd_megatron.config.model import ModelConfig
from ssd_megatron.config.schema import SSDConfig
from ssd_megatron.errors import ConfigError, DataError
from ssd_megatron.parallel.logical_state import LogicalState
from ssd_megatron.parallel.zero import MASTER
from ssd_megatron.training import checkpoint_files as files
from ssd_megatron.training.checkpoint_checks import check_tensors
from ssd_megatron.training.checkpoint_files import CheckpointError, key_of
from ssd_megatron.training.run_folder import RunFolder
from ssd_megatron.training.saved_model import SavedModel, is_router, open_model

# What changes no tensor's meaning, or shows in the tensors' shapes.
FREE = frozenset(
    {"dropout", "init_std", "seq_length", "decoder_seq_length", "vocab_size", "make_vocab_size_divisible_by"}
)


def check_start(config: RunConfig) -> None:
    """Open the checkpoint that a run is to start from, if it names one and has none of its own; needs no process group.

    Raises:
        ConfigError: there is none, or it is of another model.
    """
    path, run_dir = config.ssd_megatron.checkpoint.start_from, config.ssd_megatron.run_dir
    if path is None or files.checkpoints(RunFolder(run_dir).checkpoints):
        return
    try:
        saved = open_model(path)
    except (DataError, CheckpointError) as error:
        raise ConfigError(f"checkpoint.start_from ({path}) cannot be used: {error}") from error
    if config.ssd_megatron.ssd.partition == "kept":
        _check_experts(config.ssd_megatron.ssd, saved)
    mine, theirs = config.ssd_megatron.model, saved.settings.model
    differing = [
        f"model.{field} is {getattr(mine, field)!r}, there {getattr(theirs, field)!r}"
        for field in ModelConfig.model_fields
        if field not in FREE and getattr(mine, field) != getattr(theirs, field)
    ]
    if differing:
        raise ConfigError(
            f"checkpoint.start_from ({path}) is of another model: {'; '.join(differing)}. Use that model's settings"
        )


def _check_experts(ssd: SSDConfig, saved: SavedModel) -> None:
    theirs = saved.settings.ssd
    if not saved.settings.has_experts:
        raise ConfigError(
            f'ssd.partition ("kept") needs experts, and checkpoint.start_from ({saved.folder}) is of a model that '
            "never formed any: use kmeans"
        )
    differing = [
        f"ssd.{name} is {own!r}, there {other!r}"
        for name, own, other in (
            ("num_experts", ssd.num_experts, theirs.num_experts),
            ("router", ssd.router_kind, theirs.router_kind),
            ("balance_bias", ssd.balance_bias, theirs.balance_bias),
        )
        if own != other
    ]
    if differing:
        raise ConfigError(
            f'ssd.partition ("kept") needs the experts of checkpoint.start_from ({saved.folder}): '
            f"{'; '.join(differing)}. Use those settings, or kmeans"
        )


def read_start_weights(
    saved: SavedModel, state: LogicalState, shapes: dict[str, tuple[int, ...]], with_routers: bool
) -> None:
    """Set this rank's masters; `publish` makes the model see them. Moments and all counts stay as they are.

    Args:
        shapes: of the logical tensors of all stages.
        with_routers: routers are wanted too; else they stay as they are.
    Raises:
        CheckpointError: the checkpoint has not exactly the tensors of the model.
    """

    def wanted(name: str) -> bool:
        return with_routers or not is_router(name)

    theirs, mine = ({n: s for n, s in all_shapes.items() if wanted(n)} for all_shapes in (saved.shapes, shapes))
    check_tensors(saved.folder, theirs, mine)
    held = {
        key_of(name, kind): (part.start, part.values)
        for name, kind, part in state.held()
        if kind == MASTER and wanted(name)
    }
    files.read_intervals(saved.folder, saved.index, held)
