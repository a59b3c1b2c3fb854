"""Processes, devices and the logical state. Importing this room prepares its libraries for the accelerator at hand,
so that it must come (and, being the package of every module here, does come) before deepspeed and megatron-core."""

import logging
import os
import warnings

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # megatron-core allocates on torch.cuda.current_device() in its tensor-parallel layers.
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]

# Their warnings speak to those who program them.
logging.getLogger("megatron.core").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
