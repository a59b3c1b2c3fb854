"""Bad configs: each is answered with the field, its value, and what would work."""

from typing import Any

import pytest

from ssd_megatron.config.checks import run_checks
from ssd_megatron.config.report import known_fields, validate
from ssd_megatron.errors import ConfigError
from tests.config.conftest import DROP, GPU, Load, changed

MODEL, DATA, SSD, TRAINING = (f"ssd_megatron.{name}" for name in ("model", "data", "ssd", "training"))
MASKS = "ssd_megatron.weight_sparsity"
MASKED = {f"{SSD}.schedule": "dense"}  # as sparse weights want it
WSD = {"type": "WSD", "params": {"warmup_num_steps": 100, "decay_num_steps": 200}}


def fixed(*phases: tuple[int, str]) -> dict[str, Any]:
    return {
        f"{SSD}.schedule": "fixed",
        f"{SSD}.phases": [{"start_step": start, "mode": mode} for start, mode in phases],
    }


FIELDS: list[tuple[dict[str, Any], str]] = [
    # Types and ranges of single fields.
    ({f"{MODEL}.num_layers": "4"}, 'model.num_layers ("4") must be a whole number'),
    ({f"{MODEL}.num_layers": 2.5}, "model.num_layers (2.5) must be a whole number"),
    ({f"{MODEL}.num_layers": True}, "model.num_layers (true) must be a whole number"),
    ({f"{MODEL}.hidden_size": 0}, "model.hidden_size (0) must be at least 1"),
    ({f"{MODEL}.dropout": 1.0}, "model.dropout (1.0) must be below 1"),
    ({f"{MODEL}.init_std": 0}, "model.init_std (0) must be above 0"),
    ({f"{MODEL}.tie_embeddings": "yes"}, 'model.tie_embeddings ("yes") must be true or false'),
    ({f"{MODEL}.seq_length": DROP}, "model.seq_length is missing: Tokens per sample;"),
    ({MODEL: DROP}, "ssd_megatron.model is missing: Shape of the Transformer."),
    ({MODEL: 3}, "ssd_megatron.model (3) must be an object in braces"),
    ({"ssd_megatron": DROP}, "ssd_megatron is missing: This project's section."),
    ({f"{MODEL}.activation": "rleu"}, '"geglu_tanh" or "swiglu": did you mean "relu"?'),
    ({f"{MODEL}.normalization": "batchnorm"}, 'model.normalization ("batchnorm") must be "layernorm" or "rmsnorm"'),
    ({f"{MASKS}.sparsity": 1.0}, "weight_sparsity.sparsity (1.0) must be below 1"),
    (MASKED | {f"{MASKS}.block_size": 2}, "weight_sparsity.block_size (2) must be 1, 4, 8 or 16"),
    (MASKED | {f"{MASKS}.updates": 1}, "weight_sparsity.updates (1) must be at least 2"),
    ({MASKS: True}, "ssd_megatron.weight_sparsity (true) must be an object in braces"),
    ({f"{SSD}.similarity_threshold": 1.5}, "ssd.similarity_threshold (1.5) must be at most 1"),
    ({f"{SSD}.switch_tolerance": "tight"}, 'ssd.switch_tolerance ("tight") must be "auto", or a number'),
    ({f"{SSD}.sparse_fraction": 0}, "ssd.sparse_fraction (0) must be above 0"),
    ({"ssd_megatron.seed": -1}, "ssd_megatron.seed (-1) must be at least 0"),
    ({"optimizer.params.lr": 0}, "optimizer.params.lr (0) must be above 0"),
    ({"optimizer.params.betas": [0.9, 1.0]}, "optimizer.params.betas[1] (1.0) must be below 1"),
    ({"optimizer.params.betas": [0.9]}, "optimizer.params.betas[1] is missing"),
    ({"optimizer.type": "Lion"}, 'optimizer.type ("Lion") must be "AdamW" or "Adam"'),
    ({"optimizer": DROP}, "optimizer is missing: Optimizer and peak learning rate."),
    ({"scheduler": {"type": "Cosine", "params": {}}}, 'must have one of the types "WarmupLR", "WarmupDecayLR"'),
    ({"gradient_clipping": -1}, "gradient_clipping (-1) must be at least 0"),
    # Unknown keys, near and far.
    ({"gradient_cliping": 1.0}, "gradient_cliping (1.0) is not a known key: did you mean gradient_clipping?"),
    ({f"{SSD}.topk": 4}, "ssd.topk (4) is not a known key: did you mean top_k?"),
    (
        {f"{MODEL}.train_steps": 4},
        "model.train_steps (4) is not a known key: it belongs to ssd_megatron.training.train",
    ),
    ({"model": {}}, "model ({}) is not a known key: it belongs to ssd_megatron.model"),
    ({"optimizer.params.learning": 1}, "optimizer.params.learning (1) is not a known key: the keys here are lr, betas"),
    ({"zero_optimization.overlap": 1}, "zero_optimization.overlap (1) is not a known key: did you mean overlap_comm?"),
    # Not in this version, refused by name.
    ({"ssd_megatron.parallel.context_parallel_size": 2}, "sequence and context parallelism are not supported yet"),
    ({"ssd_megatron.ffn_expansion": 0}, "ssd_megatron.ffn_expansion (0)"),
    ({"ssd_megatron.ffn_expansion": 4}, 'ssd_megatron.ffn_expansion (4) is for ssd.schedule "sparse"'),
    (
        {"ssd_megatron.ffn_expansion": 3, f"{SSD}.schedule": "sparse"},
        "ssd_megatron.ffn_expansion (3) must divide ssd.num_experts (16): try 2 or 4",
    ),
    (
        {"ssd_megatron.ffn_expansion": 4, f"{SSD}.schedule": "sparse", f"{SSD}.top_k": 8},
        "ssd.top_k (8) computes another number of neurons than ssd_megatron.ffn_expansion (4) of 16 experts",
    ),
    ({f"{DATA}.reset_attention_mask": True}, "data.reset_attention_mask (true) is not supported yet: use false"),
    ({f"{SSD}.router": "nearest"}, 'ssd.router ("nearest") must be "centroid", "avg_k", "switch"'),
    (
        {"fp16": {"enabled": True}},
        "fp16.enabled (true) needs a device that computes in fp16; plain CPU does not: use bf16",
    ),
    ({"zero_optimization.stage": 0}, "zero_optimization.stage (0) is not supported: use 1, which costs the same"),
    ({"zero_optimization.stage": 3}, "zero_optimization.stage (3) is not supported yet: use 1 or 2"),
    ({"zero_optimization": True}, "zero_optimization (true) must be an object in braces"),
    ({"zero_optimization.offload_optimizer": {"device": "cpu"}}, "offload is not supported yet: use ZeRO stage 1 or 2"),
    ({"zero_optimization.stage3_max_live_parameters": 1}, "belongs to ZeRO-3, which is not supported yet"),
    (
        {"zero_optimization.allgather_partitions": False},
        "zero_optimization.allgather_partitions (false) is not accepted: DeepSpeed always gathers",
    ),
    (
        {"zero_optimization.ignore_unused_parameters": False},
        "zero_optimization.ignore_unused_parameters (false) is not accepted: DeepSpeed reads it with CPU offload only",
    ),
    ({"activation_checkpointing": {}}, 'use ssd_megatron.training.recompute "full"'),
    ({"checkpoint": {"load_universal": True}}, "checkpoints are this project's own: use ssd_megatron.checkpoint"),
    ({"elasticity": {"enabled": True}}, "start it again on any number of processes"),
    ({"data_efficiency": {"enabled": True}}, "set train_batch_size; a schedule of batch sizes"),
    ({"sequence_parallel_size": 2}, "sequence and context parallelism are not supported yet: leave it out"),
    ({"data_types": {"grad_accum_dtype": "fp32"}}, "types follow from the precision: use bf16"),
    ({"communication_data_type": "fp16"}, "overflows without loss scaling: use bf16 or fp32"),
    (
        {"optimizer.params.max_grad_norm": 1.0},
        "optimizer.params.max_grad_norm (1.0) is not accepted: use gradient_clip",
    ),
]

TOGETHER: list[tuple[dict[str, Any], str]] = [
    # Sizes.
    (
        {f"{MODEL}.hidden_size": 2048 // 4, f"{SSD}.num_experts": 48},
        "ssd.num_experts (48) must divide model.ffn_hidden_size (2048): try 32 or 64",
    ),
    (
        {f"{MODEL}.num_attention_heads": 5, f"{MODEL}.num_query_groups": 5},
        "model.num_attention_heads (5) must divide model.hidden_size (64): try 4 or 8, or say model.kv_channels",
    ),
    (
        {f"{MODEL}.num_query_groups": 3},
        "model.num_query_groups (3) must divide model.num_attention_heads (4): try 2 or 4",
    ),
    (
        {f"{MODEL}.num_attention_heads": 64, f"{MODEL}.position_embedding": "rope"},
        'model.position_embedding ("rope") needs an even head size, but model.hidden_size (64) / '
        "model.num_attention_heads (64) = 1",
    ),
    ({f"{MODEL}.kv_channels": 0}, "model.kv_channels (0) must be at least 1"),
    (
        {f"{MODEL}.kv_channels": 15, f"{MODEL}.position_embedding": "rope"},
        "model.kv_channels (15) must be even with rope: try 16",
    ),
    (
        MASKED | {f"{MASKS}.block_size": 16, f"{MODEL}.kv_channels": 24, f"{MODEL}.num_attention_heads": 3},
        "weight_sparsity.block_size (16) must divide the outputs for queries (72): try 8",
    ),
    ({f"{SSD}.top_k": 17}, "ssd.top_k (17) must be at most ssd.num_experts (16): try 4"),
    ({f"{SSD}.top_k": 1}, 'gives the router no gradient with ssd.router_update "straight_through": try 2'),
    (
        {f"{SSD}.routing_granularity": 129},
        "ssd.routing_granularity (129) must be at most model.seq_length (128), where a sequence is one tile: try 32",
    ),
    (
        {f"{MODEL}.family": "t5", f"{SSD}.routing_granularity": 64},
        "ssd.routing_granularity (64) must be at most model.decoder_seq_length (32), where a sequence is one tile",
    ),
    (
        {f"{MODEL}.family": "t5", "train_micro_batch_size_per_gpu": 2, "ssd_megatron.training.loss_chunk_tokens": 64},
        "training.loss_chunk_tokens (64) has no effect on microbatches with logits of 64 tokens: leave it out",
    ),
    ({f"{SSD}.router": "pkm", f"{SSD}.top_k": 1}, 'ssd.top_k (1) gives ssd.router "pkm" no gradient: try 2'),
    (
        {f"{SSD}.router": "pkm", f"{SSD}.num_experts": 32},
        'ssd.num_experts (32) must be a square with ssd.router "pkm": try 25 or 36',
    ),
    (
        {f"{SSD}.router": "vanilla"},
        'ssd.router ("vanilla") chooses single neurons, and ssd.num_experts is 16: set it to model.ffn_hidden_size',
    ),
    (
        {f"{SSD}.router": "hash", f"{SSD}.routing_granularity": 8},
        'ssd.routing_granularity (8) needs a router that scores inputs, and "hash" does not: use 1',
    ),
    (
        {f"{SSD}.router_update": "frozen", f"{SSD}.balance_bias": True},
        'ssd.balance_bias (true) needs a router of one row per expert that learns, not ssd.router "centroid" with '
        'router_update "frozen": use switch',
    ),
    (
        {f"{SSD}.router": "switch", f"{SSD}.router_update": "frozen"},
        'ssd.router_update ("frozen") has no effect: leave it out, or set ssd.router "centroid"',
    ),
    ({f"{SSD}.load_balance": 0.1}, 'ssd.load_balance (0.1) has no effect: leave it out, or set ssd.router "switch"'),
    ({f"{SSD}.check_layers": 3}, "ssd.check_layers (3) must be at most the number of layers (2)"),
    # Schedules.
    (
        {f"{SSD}.sparse_fraction": 0.8},
        "ssd.sparse_fraction (0.8) + ssd.warmup_fraction (0.1) + ssd.final_dense_fraction (0.15) = 1.05 must be at "
        "most 1: try sparse_fraction 0.75",
    ),
    ({f"{SSD}.schedule": "fixed"}, 'ssd.phases is missing: ssd.schedule "fixed" needs it'),
    (fixed((5, "dense")), "ssd.phases[0].start_step (5) must be 1"),
    (fixed((1, "dense"), (1, "sparse")), "ssd.phases[1].start_step (1) must be above the one before (1)"),
    (fixed((1, "dense"), (9, "dense")), 'ssd.phases[1].mode ("dense") must differ from the one before'),
    (
        fixed((1, "dense"), (1001, "sparse")),
        "ssd.phases[1].start_step (1001) must be at most training.train_steps (1000)",
    ),
    (fixed((1, "thick")), 'ssd.phases[0].mode ("thick") must be "dense" or "sparse"'),
    (
        {f"{SSD}.phases": [{"start_step": 1, "mode": "dense"}]},
        'has no effect: leave it out, or set ssd.schedule "fixed"',
    ),
    (
        {f"{SSD}.schedule": "dense", f"{SSD}.similarity_threshold": 0.7},
        'ssd.similarity_threshold (0.7) has no effect: leave it out, or set ssd.schedule "adaptive"',
    ),
    (
        {f"{MODEL}.rotary_base": 500.0},
        "model.rotary_base (500.0) has no effect: leave it out, or set model.position_emb",
    ),
    ({"optimizer.params.adam_w_mode": False}, "adam_w_mode (false) has no effect: leave it out, or set optimizer.type"),
    (
        {f"{TRAINING}.stop_after_step": 2000},
        "training.stop_after_step (2000) must be at most training.train_steps (1000)",
    ),
    (
        {"scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 1000}}},
        "scheduler.params.warmup_num_steps (1000) must be below training.train_steps (1000): try 100",
    ),
    ({"scheduler": {"type": "WarmupLR", "params": {}}}, "scheduler.params.warmup_num_steps is missing"),
    (
        {"scheduler": WSD, f"{TRAINING}.train_steps": 250},
        "scheduler.params.decay_num_steps (200) + warmup_num_steps (100) must be at most training.train_steps (250): "
        "try 150 or less",
    ),
    (
        {"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 9, "warmup_max_lr": 0.1}}},
        "scheduler.params.warmup_max_lr (0.1) contradicts optimizer.params.lr (0.001)",
    ),
    (
        {"optimizer.params.torch_adam": False},
        "optimizer.params.torch_adam (false) is not supported: a switch moves the moments of torch's; leave it out",
    ),
    (
        {"ssd_megatron.model.position_embedding": "rope", f"{DATA}.reset_position_ids": True},
        "data.reset_position_ids (true) has no effect with rope: use false, or learned positions",
    ),
    (
        {"zero_optimization.allgather_bucket_size": 101},
        "zero_optimization.allgather_bucket_size (101) must be even: try 102",
    ),
    # Families.
    (
        {f"{DATA}.mask_fraction": 0.2},
        'data.mask_fraction (0.2) has no effect: leave it out, or set model.family "bert"',
    ),
    ({f"{MODEL}.num_token_types": 2}, "model.num_token_types (2) has no effect"),
    (
        {f"{MODEL}.family": "bert", f"{DATA}.eod_mask_loss": True},
        'data.eod_mask_loss (true) has no effect: leave it out, or set model.family "gpt"',
    ),
    (
        {f"{MODEL}.family": "bert", f"{MODEL}.sentence_objective": "next"},
        'model.num_token_types (0) must be at least 2 with model.sentence_objective "next": try 2',
    ),
    (
        {f"{MODEL}.family": "bert", f"{DATA}.random_token_fraction": 0.3},
        "data.random_token_fraction (0.3) + data.mask_token_fraction (0.8) must be at most 1: try 0.2",
    ),
    (
        {f"{MODEL}.family": "t5", f"{MODEL}.seq_length": 512, f"{MODEL}.decoder_seq_length": 100},
        "model.decoder_seq_length (100) is too short for the spans of model.seq_length (512), data.mask_fraction "
        "(0.15) and data.mean_span_length (3.0): try 114",
    ),
    (
        {f"{MODEL}.family": "t5", f"{DATA}.mask_fraction": 0.9, f"{MODEL}.decoder_seq_length": 5000},
        "data.mask_fraction (0.9) with data.mean_span_length (3.0) makes no samples of exactly model.seq_length",
    ),
    ({f"{MODEL}.family": "t5", f"{MODEL}.add_bias": True}, "model.add_bias (true) does not go with t5: use false"),
    (
        {f"{MODEL}.position_embedding": "relative"},
        'model.position_embedding ("relative") does not go with gpt: use learned or rope',
    ),
    (
        {f"{MODEL}.family": "t5", f"{MODEL}.num_query_groups": 2},
        "model.num_query_groups (2) must be model.num_attention_heads (4) with t5: leave it out",
    ),
    ({f"{MODEL}.decoder_seq_length": 9}, "model.decoder_seq_length (9) has no effect: leave it out, or set model.fam"),
    (
        {f"{MODEL}.family": "bert", f"{MODEL}.decoder_start_token": 0},
        'model.decoder_start_token (0) has no effect: leave it out, or set model.family "t5"',
    ),
    (
        {f"{MODEL}.family": "t5", f"{MODEL}.decoder_start_token": 1000, f"{MODEL}.vocab_size": 1000},
        "model.decoder_start_token (1000) must be below model.vocab_size (1000): leave it out for the token that ends",
    ),
    (
        {f"{MODEL}.family": "t5", f"{MODEL}.decoder_start_token": -1},
        "model.decoder_start_token (-1) must be at least 0",
    ),
    (
        {f"{MODEL}.family": "t5", f"{MODEL}.relative_attention_max_distance": 16},
        "model.relative_attention_max_distance (16) must be above half of model.relative_attention_num_buckets (32)",
    ),
    ({f"{MODEL}.family": "bert", f"{MODEL}.seq_length": 7}, "model.seq_length (7) must be at least 8 with bert"),
    # Sparse weights.
    ({MASKS: {}}, 'ssd.schedule ("adaptive") cannot go with weight_sparsity: a switch moves neurons, and masks lie on'),
    (MASKED | {f"{MASKS}.updates": 1001}, "weight_sparsity.updates (1001) must be at most training.train_steps (1000)"),
    (
        MASKED | {f"{MASKS}.mask": "static", f"{MASKS}.prune_ratio": 0.5},
        'weight_sparsity.prune_ratio (0.5) has no effect: leave it out, or set weight_sparsity.mask "dynamic"',
    ),
    (
        MASKED | {f"{MASKS}.block_size": 16, f"{MODEL}.hidden_size": 72, f"{MODEL}.ffn_hidden_size": 256},
        "weight_sparsity.block_size (16) must divide the model.hidden_size (72): try 8",
    ),
    # Data.
    ({f"{DATA}.paths": DROP}, "data.paths is missing: one path or a weighted blend, or train_paths and valid_paths"),
    ({f"{DATA}.paths": [0.5, "a", "b"]}, 'must be paths, or positive weights and paths in turn: try ["a"]'),
    ({f"{DATA}.paths": [0, "a"]}, 'data.paths ([0, "a"]) must be paths, or positive weights'),
    (
        {f"{DATA}.train_paths": ["a"], f"{DATA}.valid_paths": ["b"]},
        'data.paths (["corpus"]) cannot go with data.train_paths',
    ),
    ({f"{DATA}.paths": DROP, f"{DATA}.train_paths": ["a"]}, "data.valid_paths is missing: data.train_paths needs it"),
    ({f"{DATA}.test_paths": ["a"]}, 'data.test_paths (["a"]) needs data.train_paths'),
    ({f"{DATA}.split": "90,10"}, 'data.split ("90,10") must be three weights for train, validation and test'),
    ({f"{SSD}.partition": "kmean"}, 'ssd.partition ("kmean") must be kmeans, coactivation, random, kept, or the path'),
    ({f"{SSD}.routing": "none"}, 'ssd.routing ("none") is no folder: record it first with ssd.record_routing'),
    (
        {f"{SSD}.routing": "/tmp", f"{SSD}.record_routing": "new"},
        'ssd.record_routing ("new") cannot go with ssd.routing (/tmp): keep one of them',
    ),
    (
        {f"{SSD}.record_routing": "new", "ssd_megatron.training.recompute": "full"},
        'ssd.record_routing ("new") needs training.recompute "none", and it is "full"',
    ),
    (
        {f"{SSD}.record_routing": "new", f"{SSD}.schedule": "dense"},
        'ssd.record_routing ("new") has no effect with ssd.schedule "dense": leave it out',
    ),
    ({f"{SSD}.partition": "none.safetensors"}, 'ssd.partition ("none.safetensors") is no file: record it first'),
    # Batches.
    ({"train_batch_size": DROP}, "train_batch_size is missing: samples per optimizer step over all ranks"),
    (
        {"train_micro_batch_size_per_gpu": 5},
        "train_batch_size (32) must be train_micro_batch_size_per_gpu (5) * gradient_accumulation_steps (6) * data "
        "parallel size (1) = 30: try train_batch_size 30, or train_micro_batch_size_per_gpu 4",
    ),
]


PARALLEL = "ssd_megatron.parallel"
LAYOUTS: list[tuple[dict[str, Any], int, str]] = [
    (
        {f"{PARALLEL}.tensor_parallel_size": 3},
        3,
        "parallel.tensor_parallel_size (3) must divide model.num_attention_heads (4): try 2 or 4",
    ),
    (
        {f"{PARALLEL}.tensor_parallel_size": 4, f"{MODEL}.num_query_groups": 2},
        4,
        "parallel.tensor_parallel_size (4) must divide model.num_query_groups (2): try 2",
    ),
    (
        {f"{PARALLEL}.tensor_parallel_size": 4, f"{MODEL}.make_vocab_size_divisible_by": 2, f"{MODEL}.vocab_size": 510},
        4,
        "parallel.tensor_parallel_size (4) must divide the padded vocabulary (510): try "
        "model.make_vocab_size_divisible_by 4",
    ),
    (
        {f"{MASKS}.block_size": 16, f"{PARALLEL}.tensor_parallel_size": 4, f"{SSD}.schedule": "dense"}
        | {f"{MODEL}.hidden_size": 32},
        4,
        "weight_sparsity.block_size (16) must divide the model.hidden_size (32) on each of 4 ranks: try 8",
    ),
    (
        {f"{MASKS}.block_size": 8, f"{PARALLEL}.expert_parallel_size": 16, f"{SSD}.schedule": "dense"}
        | {f"{MODEL}.ffn_hidden_size": 64},
        16,
        "weight_sparsity.block_size (8) must divide the model.ffn_hidden_size (64) on each of 16 ranks: try 4",
    ),
    (
        {f"{PARALLEL}.pipeline_parallel_size": 3},
        3,
        "parallel.pipeline_parallel_size (3) must divide model.num_layers (2): try 2",
    ),
    (
        {f"{PARALLEL}.expert_parallel_size": 32},
        32,
        "parallel.expert_parallel_size (32) * parallel.tensor_parallel_size (1) must divide ssd.num_experts (16): try",
    ),
    (
        {f"{PARALLEL}.pipeline_parallel_size": 2, f"{SSD}.router": "hash"},
        2,
        'parallel.pipeline_parallel_size (2) does not work with ssd.router "hash": only the first stage knows',
    ),
    (
        {f"{PARALLEL}.pipeline_parallel_size": 2, "zero_optimization.stage": 2},
        2,
        "zero_optimization.stage (2) does not work with pipeline_parallel_size (2): use stage 1",
    ),
    (
        {f"{PARALLEL}.dense_gather": "step", f"{PARALLEL}.expert_parallel_size": 2, "zero_optimization.stage": 2},
        2,
        'zero_optimization.stage (2) reduces gradients per microbatch; parallel.dense_gather "step" needs 1',
    ),
    (
        {f"{PARALLEL}.dense_gather": "step"},
        1,
        'parallel.dense_gather ("step") has no effect with expert_parallel_size 1: leave it out',
    ),
    (
        {f"{PARALLEL}.dense_gather": "step", f"{PARALLEL}.expert_parallel_size": 2, f"{SSD}.schedule": "sparse"},
        2,
        'parallel.dense_gather ("step") has no effect with ssd.schedule "sparse": leave it out',
    ),
    (
        {f"{SSD}.rebalance_limit": 1.2},
        4,
        "ssd.rebalance_limit (1.2) has no effect with tensor_parallel_size 1 and expert_parallel_size 1",
    ),
    (
        {f"{PARALLEL}.pipeline_parallel_size": 2, "zero_optimization.overlap_comm": True},
        2,
        "zero_optimization.overlap_comm (true) has no effect with pipeline_parallel_size (2), where DeepSpeed switches "
        "it off: leave it out",
    ),
    (
        {f"{PARALLEL}.expert_parallel_size": 2, "communication_data_type": "bf16"},
        2,
        'communication_data_type ("bf16") does not hold for expert-parallel weights, whose gradients are reduced in '
        "the type of training, fp32: leave it out, or use expert_parallel_size 1",
    ),
    (
        {f"{PARALLEL}.expert_parallel_size": 2, "communication_data_type": "fp32", "bf16.enabled": True},
        2,
        'communication_data_type ("fp32") does not hold for expert-parallel weights',
    ),
    (
        {f"{PARALLEL}.expert_parallel_size": 2, "zero_optimization.reduce_scatter": False},
        2,
        "zero_optimization.reduce_scatter (false) must be true with expert_parallel_size (2)",
    ),
    (
        {f"{PARALLEL}.tensor_parallel_size": 2},
        3,
        "parallel.tensor_parallel_size (2) * pipeline_parallel_size (1) = 2 must divide the number of processes (3): "
        "start 6",
    ),
    (
        {f"{PARALLEL}.expert_parallel_size": 4},
        2,
        "parallel.expert_parallel_size (4) must divide the data parallel size (2 = 2 processes / 1 tensor / 1 "
        "pipeline): try 2",
    ),
]


@pytest.mark.parametrize(("changes", "world_size", "message"), LAYOUTS)
def test_a_layout_that_does_not_fit_is_refused(
    load: Load, changes: dict[str, Any], world_size: int, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load({"train_batch_size": 96} | changes, world_size=world_size)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "world_size"),
    [
        ({f"{PARALLEL}.dense_gather": "microbatch"}, 1),
        ({f"{PARALLEL}.dense_gather": "step", f"{PARALLEL}.expert_parallel_size": 2}, 2),
        ({f"{SSD}.rebalance_limit": None}, 1),
        ({f"{SSD}.rebalance_limit": 1.2, f"{PARALLEL}.expert_parallel_size": 2}, 2),
        ({"zero_optimization.overlap_comm": False, f"{PARALLEL}.pipeline_parallel_size": 2}, 2),
        ({"zero_optimization.overlap_comm": True}, 2),
        ({"communication_data_type": "bf16"}, 2),
        ({"communication_data_type": "fp32", f"{PARALLEL}.expert_parallel_size": 2}, 2),
        ({"zero_optimization.allgather_partitions": True, "zero_optimization.ignore_unused_parameters": True}, 1),
    ],
)
def test_what_has_an_effect_or_is_the_default_is_accepted(load: Load, changes: dict[str, Any], world_size: int) -> None:
    config = load(changes, world_size=world_size)
    assert {"allgather_partitions", "ignore_unused_parameters"}.isdisjoint(config.deepspeed["zero_optimization"])


def test_data_parallel_size_is_what_model_parallelism_leaves(load: Load) -> None:
    sizes = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "expert_parallel_size": 2}
    config = load({PARALLEL: sizes}, world_size=16)
    assert config.data_parallel_size == 4
    assert config.micro_batch_size * config.gradient_accumulation_steps == 8


@pytest.mark.parametrize(("changes", "message"), FIELDS + TOGETHER)
def test_problem_names_field_value_and_remedy(load: Load, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(changes)
    heading, *lines = str(caught.value).splitlines()
    assert heading.startswith("1 problem in ") and heading.endswith("ds.json:")
    assert len(lines) == 1
    assert message in lines[0]


def test_one_precision(load: Load) -> None:
    with pytest.raises(ConfigError, match=r"fp16.enabled \(true\) cannot go with bf16.enabled: keep one of them"):
        load({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, hardware=GPU)
    assert load({"fp16": {"enabled": True}}, hardware=GPU).dtype == "float16"


def test_batch_must_divide_over_the_processes(load: Load) -> None:
    with pytest.raises(
        ConfigError, match=r"train_batch_size \(32\) must be a multiple of the data parallel size \(5, "
    ):
        load(world_size=5)


def test_all_problems_are_reported_together(load: Load) -> None:
    changes = {
        "gradient_cliping": 1.0,
        "train_batch_size": 33,
        "optimizer.params.lr": "high",
        f"{MODEL}.num_layers": 0,
        f"{MODEL}.num_attention_heads": 5,
        f"{SSD}.num_experts": 48,
        f"{TRAINING}.train_steps": DROP,
        f"{DATA}.paths": DROP,
    }
    with pytest.raises(ConfigError) as caught:
        load(changes, "ssd_megatron.ssd.topk=3", world_size=2)
    heading, *lines = str(caught.value).splitlines()
    assert heading.startswith("9 problems in ")
    for beginning in (
        "--set ssd_megatron.ssd.topk: no such field: did you mean ssd_megatron.ssd.top_k?",
        "training.train_steps is missing",
        "model.num_layers (0) must be at least 1",
        'optimizer.params.lr ("high") must be a number',
        "gradient_cliping (1.0) is not a known key",
        "model.num_attention_heads (5) must divide model.hidden_size (64)",
        "ssd.num_experts (48) must divide model.ffn_hidden_size (256): try 32 or 64",
        "data.paths is missing",
        "train_batch_size (33) must be a multiple of the data parallel size (2",
    ):
        assert sum(line.startswith(f"  - {beginning}") for line in lines) == 1, beginning


def test_a_broken_size_is_not_blamed_on_what_depends_on_it(load: Load) -> None:
    with pytest.raises(ConfigError) as caught:
        load({f"{MODEL}.hidden_size": "wide", f"{SSD}.num_experts": 48})
    assert str(caught.value).splitlines()[1:] == ['  - model.hidden_size ("wide") must be a whole number']


def test_a_given_size_is_checked_though_another_is_broken(load: Load) -> None:
    with pytest.raises(ConfigError, match=r"ssd.num_experts \(48\) must divide model.ffn_hidden_size \(256\)"):
        load({f"{MODEL}.hidden_size": "wide", f"{MODEL}.ffn_hidden_size": 256, f"{SSD}.num_experts": 48})


@pytest.mark.parametrize("value", [None, True, -1, 0, 2.5, 10**9, "", "x", [], [1], ["x", 2], {}, {"a": 1}], ids=str)
def test_any_value_anywhere_gives_a_config_or_a_report(value: Any) -> None:
    accepted = 0
    for path in known_fields():
        values, problems = validate(changed({"scheduler": WSD} | {path: value}))
        problems += run_checks(values, {path})
        assert all(" is missing" in line or " (" in line for line in problems), (path, problems)
        accepted += not problems
    assert accepted < len(known_fields())


def test_refused_blocks_that_are_switched_off_ask_for_nothing(load: Load) -> None:
    plain = load()
    off = load({"fp8": {"enabled": False, "margin": 0}, "prescale_gradients": False, "autotuning.enabled": False})
    assert off.deepspeed == plain.deepspeed
