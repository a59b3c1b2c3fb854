"""Checkpoints as models to use: any layout's onto one device, or over those of tensor-parallel ranks."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from ssd_megatron.config.check_list import divisors_near
from ssd_megatron.config.schema import expert_shape
from ssd_megatron.errors import ConfigError
from ssd_megatron.ffn.kernels.trial import fastest_right, router_backend
from ssd_megatron.ffn.router_kinds import KINDS
from ssd_megatron.inference.bert import MaskedModel
from ssd_megatron.inference.ffn import MODES, Experts, Mode
from ssd_megatron.inference.model import CausalModel, Model
from ssd_megatron.inference.place import Place
from ssd_megatron.inference.t5 import EncoderDecoder
from ssd_megatron.model.language_model import ffn_names
from ssd_megatron.parallel.collectives import Group
from ssd_megatron.parallel.sharding import row_shard
from ssd_megatron.training.checkpoint_checks import check_tensors
from ssd_megatron.training.saved_model import SavedModel, Settings, is_router, open_model

MODELS: dict[str, type[Model]] = {"gpt": CausalModel, "bert": MaskedModel, "t5": EncoderDecoder}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load(
    path: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    mode: Mode = "auto",
    top_k: float | Sequence[int] | None = None,
    group: Group | None = None,
) -> Model:
    """The model of a run_dir's newest complete checkpoint, or of one checkpoint's folder, ready to use: `CausalModel`,
    of a bert `MaskedModel`, of a t5 `EncoderDecoder`.

    Args:
        mode: dense; sparse; auto: sparse where that is faster (inference/ffn.py).
        top_k: experts per token: as saved without it; a mean over the layers, which scales what the last switch gave
            each of them; or a list, one number a layer.
        group: ranks that use the model together, each with its part of heads, neurons and vocabulary; all of them call
            this, and the model. `place.launched_group` has those that a launcher started.
    Raises:
        DataError: there is no checkpoint.
        CheckpointError: it cannot be read, or has not exactly the tensors of its model.
        ConfigError: the model cannot run as asked.
    """
    return from_saved(open_model(Path(path)), device, dtype, mode, top_k, group)


def from_saved(
    saved: SavedModel,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    mode: Mode = "auto",
    top_k: float | Sequence[int] | None = None,
    group: Group | None = None,
) -> Model:
    """See `load`."""
    place, settings = Place(dtype, torch.device(device), group), saved.settings
    _check_can_run(saved, mode, top_k)
    experts, runs_sparse = None, settings.has_experts and settings.only_in_training is None
    _check_parts(settings, place.ranks, runs_sparse)
    if runs_sparse:
        ssd, shape = settings.ssd, expert_shape(settings.model, settings.ssd)
        backend = fastest_right(place.device, dtype, settings.model.activation, shape)
        scores = router_backend(place.device, dtype, settings.model.activation)
        experts = Experts(ssd.num_experts, ssd.router, ssd.router_update, ssd.balance_bias, backend, scores)
    model = MODELS[settings.model.family](settings.model, experts, place)
    targets = model.logical_parameters()
    # Of a run that has never formed experts, the routers say nothing.
    wanted = {name: shape for name, shape in saved.shapes.items() if runs_sparse or not is_router(name)}
    check_tensors(saved.folder, wanted, {name: row_shard(target).shape(target) for name, target in targets.items()})
    for name, target in targets.items():
        target.copy_(saved.rows(name, row_shard(target).first, len(target)))
    if runs_sparse:
        names, neuron_ids = ffn_names(settings.model.total_layers), saved.neuron_ids()
        for name, ffn, number in zip(names, model.ffns, layer_top_k(settings, top_k), strict=True):
            ffn.top_k = number
            ffn.bank.neuron_ids.copy_(neuron_ids[name])
    model.set_mode(mode)
    return model


def variants(
    settings: Settings,
    modes: str | None,
    means: Iterable[float | None],
    only_sparse: Mapping[str, object],
    *,
    lacking: str | None,
) -> list[tuple[str, list[int] | None]]:
    """The ways to run a model that are asked for: what people call each, and experts per token of each layer, None of
    dense mode.

    Args:
        modes: dense, sparse, or both with a comma; None: what the model can.
        means: of the sparse ways, each as `layer_top_k` takes it.
        only_sparse: see `refuse_in_dense`.
        lacking: a setting of the model that its user cannot run sparse, by `Settings.only_in_training`; None: it can.
    Raises:
        ConfigError: the model cannot run so.
    """
    names = (modes or ("dense,sparse" if settings.has_experts and lacking is None else "dense")).split(",")
    unknown = [name for name in names if name not in ("dense", "sparse")]
    if unknown:
        raise ConfigError(f"mode ({unknown[0]}) must be dense or sparse")
    refuse_in_dense(names, only_sparse)
    if "sparse" in names and not settings.has_experts:
        raise ConfigError("mode (sparse) needs experts, which this model never formed: use dense")
    if "sparse" in names and lacking is not None:
        raise _cannot_run("sparse", lacking)
    found: list[tuple[str, list[int] | None]] = [("dense", None)] if "dense" in names else []
    for mean in means if "sparse" in names else ():
        top_k = layer_top_k(settings, mean)
        found.append((f"sparse, top_k {sum(top_k) / len(top_k):g}", top_k))
    return found


def refuse_in_dense(modes: Iterable[str], only_sparse: Mapping[str, object]) -> None:
    """Refuse what has no effect in dense mode, where there is no other.

    Args:
        only_sparse: what was asked for, by name; None: it was not.
    Raises:
        ConfigError: there is such a thing.
    """
    for name, value in only_sparse.items():
        if value is not None and set(modes) == {"dense"}:
            raise ConfigError(f"{name} ({value}) has no effect without mode sparse")


def layer_top_k(settings: Settings, top_k: float | Sequence[int] | None) -> list[int]:
    """Experts per token of each layer.

    Raises:
        ConfigError: a number is not between 1 and the number of experts, or there is not one for each layer.
    """
    experts, layers = settings.ssd.num_experts, settings.model.total_layers
    if top_k is None:
        return settings.top_k
    means: Sequence[float] = [top_k] if isinstance(top_k, int | float) else top_k
    if not all(1 <= number <= experts for number in means):
        raise ConfigError(f"top_k ({top_k}) must be between 1 and the model's {experts} experts")
    if isinstance(top_k, int | float):
        return scale_top_k(settings.top_k, top_k, experts)
    if len(top_k) != layers:
        raise ConfigError(f"top_k ({top_k}) must be one number, or one for each of the {layers} layers")
    return list(top_k)


def scale_top_k(saved: Sequence[int], mean: float, num_experts: int) -> list[int]:
    """The same shares of another number of experts: `mean` on average, at least 1 and at most all in each layer.

    Experts are dealt out one by one to the layer that lacks most of its share, the first of equals.
    """
    shares = [mean * len(saved) * number / sum(saved) for number in saved]
    scaled = [1] * len(saved)
    for _ in range(round(mean * len(saved)) - len(saved)):
        open_layers = [layer for layer, number in enumerate(scaled) if number < num_experts]
        scaled[max(open_layers, key=lambda layer: shares[layer] - scaled[layer])] += 1
    return scaled


def _check_parts(settings: Settings, ranks: int, runs_sparse: bool) -> None:
    model, ssd = settings.model, settings.ssd
    for name, number in (
        ("model.num_attention_heads", model.num_attention_heads),
        ("model.num_query_groups", model.num_query_groups),
        ("the padded vocabulary", model.padded_vocab_size),
        ("ssd.num_experts", ssd.num_experts) if runs_sparse else ("model.ffn_hidden_size", model.ffn_hidden_size),
    ):
        if number % ranks:
            hint = divisors_near(number, ranks)
            raise ConfigError(f"the number of processes ({ranks}) must divide {name} ({number}): start {hint}")


def _check_can_run(saved: SavedModel, mode: str, top_k: object) -> None:
    if mode not in MODES:
        raise ConfigError(f"mode ({mode}) is unknown: use one of {', '.join(MODES)}")
    lacking = saved.settings.only_in_training
    if lacking is not None and saved.settings.has_experts and mode != "dense":
        raise _cannot_run(mode, lacking)
    router = saved.settings.ssd.router
    if saved.settings.has_experts and mode == "auto" and KINDS[router].scales:
        raise ConfigError(
            f"mode (auto) cannot go from one mode to the other with ssd.router ({router}), whose sparse outputs are "
            "scaled: use dense or sparse"
        )
    if saved.settings.has_experts:
        return
    if mode == "sparse":
        raise ConfigError(
            f"mode (sparse) needs experts, and {saved.folder} is of a model that never formed any: use dense or auto, "
            "or a checkpoint after the run's first switch to sparse"
        )
    if top_k is not None:
        raise ConfigError(f"top_k ({top_k}) has no effect: {saved.folder} is of a model that never formed experts")


def _cannot_run(mode: str, lacking: str) -> ConfigError:
    return ConfigError(f"mode ({mode}) cannot run this model's {lacking}: use dense")
