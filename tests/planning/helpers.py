"""Small jobs whose numbers are easy to work out."""

from typing import Any

from ssd_megatron.config.model import ModelConfig
from ssd_megatron.config.schema import DataConfig, SSDConfig, SsdMegatronConfig, TrainingConfig
from ssd_megatron.planning.cluster import Cluster, Gpu
from ssd_megatron.planning.recommend import Job

GPU = Gpu(memory_gib=100.0, peak_tflops=1000.0, memory_gbs=4000.0, link_gbs=400.0)


def model(**changes: Any) -> ModelConfig:
    """h 64, 4 heads, 256 neurons, 4 layers, 32 tokens a sample, 512 words."""
    settings = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 32, "vocab_size": 512}
    return ModelConfig(**(settings | changes))


def ssd(**changes: Any) -> SSDConfig:
    return SSDConfig(**({"num_experts": 16, "top_k": 4} | changes))


def cluster(gpus: int = 16, **changes: Any) -> Cluster:
    """Nodes of 8 GPUs; 400 GB/s inside, 50 GB/s between; half of 1,000 TFLOP/s."""
    settings = {"gpus_per_node": min(8, gpus), "fraction": 0.5, "intra_gbs": 400.0, "inter_gbs": 50.0}
    return Cluster(gpu=GPU, gpus=gpus, **(settings | changes))


def job(gpus: int = 16, batch: int = 64, *, in_cluster: Cluster | None = None, **changes: Any) -> Job:
    """`changes` are of the model; `ssd` and `training` may be among them."""
    networks = changes.pop("ssd", ssd())
    training = changes.pop("training", TrainingConfig(train_steps=100))
    config = SsdMegatronConfig(
        run_dir="run",
        model=model(**changes),
        data=DataConfig(paths=("corpus",), tokenizer="tokenizer.model"),
        ssd=networks,
        training=training,
    )
    return Job(config, in_cluster or cluster(gpus), batch, "bfloat16", reduce_bucket_size=1000, multi_rank=True)
