"""Distributed pre-training of language models with switchable sparse-dense learning.

The names below are the public ones (docs/api.md). Each is imported from its room when it is first asked for, so that
importing the package alone takes no torch.
"""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

# Their import warnings are about optional packages; parallel.device.missing_packages says that once, with the cost.
for _library in ("megatron", "deepspeed"):
    warnings.filterwarnings("ignore", module=_library)

if TYPE_CHECKING:
    from ssd_megatron.data.tokenizers import load_tokenizer as load_tokenizer
    from ssd_megatron.ffn.routers import Router as Router
    from ssd_megatron.ffn.routers import router_weights_from_bank as router_weights_from_bank
    from ssd_megatron.inference.generate import generate as generate
    from ssd_megatron.inference.load import load as load
    from ssd_megatron.inference.sampling import Sampling as Sampling
    from ssd_megatron.inference.text import complete as complete
    from ssd_megatron.switching.partition import coactivation_partition as coactivation_partition
    from ssd_megatron.switching.partition import kmeans_partition as kmeans_partition
    from ssd_megatron.switching.partition import partition_order as partition_order
    from ssd_megatron.training.run import train as train
else:
    _HOMES = {
        "Router": "ffn.routers",
        "Sampling": "inference.sampling",
        "coactivation_partition": "switching.partition",
        "complete": "inference.text",
        "generate": "inference.generate",
        "kmeans_partition": "switching.partition",
        "load": "inference.load",
        "load_tokenizer": "data.tokenizers",
        "partition_order": "switching.partition",
        "router_weights_from_bank": "ffn.routers",
        "train": "training.run",
    }

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
