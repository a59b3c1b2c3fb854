"""Keys that are known and refused by name, each with what to use instead. A block that is switched off asks for nothing
and is left out: `"fp8": {"enabled": false}`; and so is a switch that is always on, where it is on.
"""

from typing import Any

_BATCHES = "set train_batch_size; a schedule of batch sizes or data is not in this version"
_PARALLEL = "use ssd_megatron.parallel"
_ZERO3 = "belongs to ZeRO-3, which is not supported yet: leave it out"
_OFFLOAD = "offload is not supported yet: use ZeRO stage 1 or 2, and training.recompute to save memory"
_OWN_CHECKPOINTS = "checkpoints are this project's own: use ssd_megatron.checkpoint"
_PRECISION = "use bf16"
_SEQUENCE = "sequence and context parallelism are not supported yet: leave it out"
_GRADIENTS = "gradients are summed and divided by the global number of tokens: leave it out"

REFUSED: dict[str, str] = {
    "fp16.auto_cast": "inputs are token ids: leave it out",
    "fp16.fp16_master_weights_and_grads": "masters are fp32: leave it out",
    "fp8": f"not supported yet: {_PRECISION}",
    "amp": f"removed from DeepSpeed: {_PRECISION}",
    "bfloat16": f"an old name: {_PRECISION}",
    "torch_autocast": f"not supported: {_PRECISION}",
    "data_types": f"types follow from the precision: {_PRECISION}",
    "bf16.immediate_grad_update": "not supported: leave it out",
    "bf16.check_grad_overflow": "NaN and infinite gradients are always caught: see training.max_bad_steps",
    "bf16.bf16_master_weights_and_grads": "masters are fp32: leave it out",
    "bf16.bf16_optimizer_states": "optimizer states are fp32: leave it out",
    "activation_checkpointing": 'use ssd_megatron.training.recompute "full"',
    "checkpoint": _OWN_CHECKPOINTS,
    "nebula": _OWN_CHECKPOINTS,
    "datastates": _OWN_CHECKPOINTS,
    "aio": _OFFLOAD,
    "zero_optimization.allgather_partitions": "DeepSpeed always gathers updated parameters: leave it out",
    "zero_optimization.ignore_unused_parameters": "DeepSpeed reads it with CPU offload only: leave it out",
    "zero_optimization.round_robin_gradients": "a switch needs the parameters in order: leave it out",
    "zero_allow_untested_optimizer": "AdamW and Adam need no permission: leave it out",
    "zero_force_ds_cpu_optimizer": _OFFLOAD,
    "sequence_parallel_size": _SEQUENCE,
    "seq_parallel_communication_data_type": _SEQUENCE,
    "parallel.sequence_parallel": _SEQUENCE,
    "parallel.sequence_parallel_size": _SEQUENCE,
    "parallel.context_parallel_size": _SEQUENCE,
    "parallel.data_parallel_size": "it follows from the number of processes: leave it out",
    "tensor_parallel": _PARALLEL,
    "expert_parallel": _PARALLEL,
    "pipeline": _PARALLEL,
    "mesh_param": _PARALLEL,
    "use_data_before_expert_parallelism": _PARALLEL,
    "elasticity": "removed from DeepSpeed: stop the run and start it again on any number of processes",
    "autotuning": "not supported: --dry_run shows the memory of a layout before it runs",
    "data_efficiency": _BATCHES,
    "curriculum_learning": _BATCHES,
    "dynamic_batching": _BATCHES,
    "rampup_batch_size": _BATCHES,
    "dataloader_drop_last": "samples are drawn for whole steps: leave it out",
    "managed_gradient_accumulation": "the trainer decides when a step ends: leave it out",
    "prescale_gradients": _GRADIENTS,
    "gradient_predivide_factor": _GRADIENTS,
    "gradient_allreduce_op": _GRADIENTS,
    "disable_allgather": "not supported: leave it out",
    "sparse_gradients": "removed from DeepSpeed: leave it out",
    "sparse_attention": "removed from DeepSpeed: leave it out",
    "compression_training": "removed from DeepSpeed: leave it out",
    "quantize_training": "removed from DeepSpeed: leave it out",
    "eigenvalue": "removed from DeepSpeed: leave it out",
    "progressive_layer_drop": "removed from DeepSpeed: leave it out",
    "graph_harvesting": "removed from DeepSpeed: leave it out",
    "weight_quantization": "not in this version: leave it out",
    "hybrid_engine": "not in this version: leave it out",
    "compile": "not in this version: leave it out",
    "timers": "see wall_clock_breakdown",
    "disable_python_gc": "the trainer decides: leave it out",
    "vocabulary_size": "use ssd_megatron.model.vocab_size",
    "optimizer.legacy_fusion": "not supported: leave it out",
    "optimizer.params.max_grad_norm": "use gradient_clipping",
    "comet.api_key": "secrets do not belong in a file that is written beside every run: set COMET_API_KEY",
    "zero_optimization.offload_optimizer": _OFFLOAD,
    "zero_optimization.offload_param": _OFFLOAD,
    "zero_optimization.cpu_offload": _OFFLOAD,
    "zero_optimization.cpu_offload_param": _OFFLOAD,
    "zero_optimization.cpu_offload_use_pin_memory": _OFFLOAD,
    "zero_optimization.zenflow": _OFFLOAD,
    "zero_optimization.compute_grad_norm": "the gradient norm is always logged: leave it out",
    "zero_optimization.load_from_fp32_weights": _OWN_CHECKPOINTS,
    "zero_optimization.elastic_checkpoint": _OWN_CHECKPOINTS,
    "zero_optimization.legacy_stage1": "removed from DeepSpeed: leave it out",
    "zero_optimization.parameter_alignment": "not supported: leave it out",
    "zero_optimization.enable_sanity_checks": _ZERO3,
    "zero_optimization.sub_group_size": _ZERO3,
    "zero_optimization.zero_hpz_partition_size": _ZERO3,
    "zero_optimization.zero_quantized_weights": _ZERO3,
    "zero_optimization.zero_quantized_nontrainable_weights": _ZERO3,
    "zero_optimization.zero_quantized_gradients": _ZERO3,
    "zero_optimization.memory_efficient_linear": _ZERO3,
    "zero_optimization.override_module_apply": _ZERO3,
    "zero_optimization.log_trace_cache_warnings": _ZERO3,
    "zero_optimization.leaf_module": _ZERO3,
    "zero_optimization.pipeline_loading_checkpoint": _ZERO3,
    "zero_optimization.save_muon_momentum_buffer_in_memory": _ZERO3,
    "zero_optimization.mics_shard_size": _ZERO3,
    "zero_optimization.mics_hierarchical_params_gather": _ZERO3,
    "zero_optimization.zeropp_loco_param": _ZERO3,
}


_ALWAYS_ON = ("zero_optimization.allgather_partitions", "zero_optimization.ignore_unused_parameters")


def reason_for(path: str) -> str | None:
    """Why a key is refused, or None if it is not known at all."""
    if path.startswith("zero_optimization.stage3_"):
        return _ZERO3
    return REFUSED.get(path)


def asks_for_nothing(path: str, value: Any) -> bool:
    """Whether the value of a refused key changes nothing."""
    if path in _ALWAYS_ON:
        return value is True
    return value is False or (isinstance(value, dict) and value.get("enabled") is False)
