"""`ffn_expansion`: networks with so many times the neurons, of which a token computes as many as before.

Source: A Unified View of Sparse Feed-Forward Networks (arXiv 2305.13999).
"""

from typing import Any

from ssd_megatron.config.check_list import divisors_near
from ssd_megatron.config.model import ModelConfig
from ssd_megatron.config.report import SECTION, problem
from ssd_megatron.config.schema import SSDConfig

FIELD = f"{SECTION}.ffn_expansion"


def expand_networks(raw: dict[str, Any]) -> list[str]:
    """Say it in place by the fields that it stands for, `model.ffn_hidden_size` and `ssd.top_k`; returns problems.

    What is not there or not usable is left to the checks of the fields.
    """
    section = raw.get(SECTION)
    if not isinstance(section, dict) or not _is_size(section.get("ffn_expansion")):
        return []
    factor, model, ssd = section.pop("ffn_expansion"), section.get("model"), section.setdefault("ssd", {})
    if not isinstance(model, dict) or not isinstance(ssd, dict):
        return []
    neurons, experts = _dense_neurons(model), ssd.get("num_experts", SSDConfig().num_experts)
    if not _is_size(neurons) or not _is_size(experts):
        return []
    if ssd.get("schedule") != "sparse":
        return [
            problem(
                FIELD,
                factor,
                f'is for ssd.schedule "sparse": dense phases would compute {factor} times as much. For those, set '
                "model.ffn_hidden_size",
            )
        ]
    if experts % factor:
        return [
            problem(FIELD, factor, f"must divide ssd.num_experts ({experts}): try {divisors_near(experts, factor)}")
        ]
    if ssd.setdefault("top_k", experts // factor) != experts // factor:
        return [
            problem(
                "ssd.top_k",
                ssd["top_k"],
                f"computes another number of neurons than {FIELD} ({factor}) of {experts} experts: leave it out, or "
                f"use {experts // factor}",
            )
        ]
    model["ffn_hidden_size"] = factor * neurons
    return []


def _dense_neurons(model: dict[str, Any]) -> Any:
    given, hidden = model.get("ffn_hidden_size"), model.get("hidden_size")
    if given is None and _is_size(hidden):
        return ModelConfig.model_fields["ffn_hidden_size"].get_default(
            call_default_factory=True, validated_data={"hidden_size": hidden}
        )
    return given


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
