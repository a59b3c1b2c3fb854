"""Distributed pre-training of language models with switchable sparse-dense learning."""

import warnings

# Their import warnings are about optional packages; parallel.device.missing_packages says that once, with the cost.
for _library in ("megatron", "deepspeed"):
    warnings.filterwarnings("ignore", module=_library)
