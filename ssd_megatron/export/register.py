"""Importing this makes transformers know exported sparse models without `trust_remote_code`."""

from transformers import AutoConfig, AutoModelForCausalLM

from ssd_megatron.export.modeling_ssd import SsdConfig, SsdForCausalLM

AutoConfig.register(SsdConfig.model_type, SsdConfig)
AutoModelForCausalLM.register(SsdConfig, SsdForCausalLM)
