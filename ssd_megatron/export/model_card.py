"""README.md of an exported model: what it is, how it was trained, how to use it."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

from ssd_megatron.switching.schedule import Decision, phases_until
from ssd_megatron.training.metrics import Record, read_metrics
from ssd_megatron.training.saved_model import SavedModel

# What each family is called, its pipeline and how it is used; of a GPT also sparse.
NAMES = {"gpt": "GPT", "bert": "BERT", "t5": "T5"}
PIPELINES = {"gpt": "text-generation", "bert": "fill-mask", "t5": "text2text-generation"}
GPT = """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, model = (kind.from_pretrained(".") for kind in (AutoTokenizer, AutoModelForCausalLM))
tokens = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=50)[0]))"""
SPARSE_GPT = """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)  # runs modeling_ssd.py of this folder
model.set_mode("sparse")  # each token computes some experts; "dense": all neurons
tokens = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=50)[0]))"""
BERT = """from transformers import pipeline

fill = pipeline("fill-mask", model=".")
for filled in fill(f"Once {fill.tokenizer.mask_token} a time"):
    print(filled["score"], filled["sequence"])"""
T5 = """from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer, model = (kind.from_pretrained(".") for kind in (AutoTokenizer, AutoModelForSeq2SeqLM))
tokens = tokenizer("Once <extra_id_0> a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=50)[0]))"""
USE = {("gpt", "dense"): GPT, ("gpt", "sparse"): SPARSE_GPT, ("bert", "dense"): BERT, ("t5", "dense"): T5}


def model_card(saved: SavedModel, mode: str) -> str:
    """Markdown with front matter."""
    family = saved.settings.model.family
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            f"pipeline_tag: {PIPELINES[family]}",
            "tags: [ssd_megatron, activation-sparsity]",
            "---",
            "",
            f"# {saved.folder.name} of {_run_name(saved.folder)}",
            "",
            f"A {NAMES[family]} trained by ssd_megatron with switchable sparse-dense learning ([arXiv 2410.03440]"
            "(https://arxiv.org/abs/2410.03440)): the same weights in phases in which every token computes all neurons "
            "of a feed-forward network, and others in which it computes some experts only.",
            "",
            *_facts(saved, mode),
            "",
            "## Use",
            "",
            f"```python\n{USE[family, mode]}\n```",
            "",
            "## Settings of the run",
            "",
            "```json",
            json.dumps(saved.index.values["identity"], indent=1),
            "```",
            "",
        ]
    )


def _facts(saved: SavedModel, mode: str) -> Iterator[str]:
    settings, step = saved.settings, saved.index.step
    yield f"* exported: {mode} mode, {sum(map(math.prod, saved.shapes.values())):,} parameters, step {step}"
    if settings.has_experts:
        numbers = ", ".join(map(str, settings.top_k))
        yield f"* experts: {settings.ssd.num_experts} in each layer; a token computes, by layer: {numbers}"
    decisions = [Decision(**decision) for decision in saved.index.values["coordinator"]["schedule"]["decisions"]]
    if decisions:
        phases = (f"{phase.mode} {phase.start_step}-{phase.end_step}" for phase in phases_until(decisions, step))
        yield f"* phases, by step: {', '.join(phases)}"
    for record in _last_evaluation(saved.folder, step):
        losses = (f"{record[f'loss_{mode}']:.4f} {mode}" for mode in ("dense", "sparse") if record[f"loss_{mode}"])
        yield f"* validation loss at step {record['step']}: {', '.join(losses)} (nats per token)"


def _last_evaluation(folder: Path, step: int) -> list[Record]:
    """The last one up to `step`, where the checkpoint still lies in its run_dir."""
    run_dir = folder.parent.parent
    if not (run_dir / "metrics.jsonl").exists():
        return []
    records = [r for r in read_metrics(run_dir) if r["kind"] == "eval" and r["step"] <= step]
    return records[-1:]


def _run_name(folder: Path) -> str:
    return folder.parent.parent.name if folder.parent.name == "checkpoints" else folder.parent.name
