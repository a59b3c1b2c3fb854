"""What a family of models reads from a batch: which fields its first stage takes, and what its losses need."""

from dataclasses import dataclass

from ssd_megatron.config.model import ModelConfig


@dataclass(frozen=True)
class Fields:
    """Names of a batch's tensors, samples first.

    Attributes:
        inputs: what the first stage takes, in order.
        targets: what the last stage's losses take.
        masks: one for each part of the loss: 1 where a loss counts.
    """

    inputs: tuple[str, ...]
    targets: tuple[str, ...]
    masks: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        return self.inputs + self.targets + self.masks


def batch_fields(model: ModelConfig) -> Fields:
    """The fields of a family's batches; `tokens`, [samples, seq_length], are among the inputs of every one."""
    if model.family == "t5":
        return Fields(("tokens", "decoder_tokens"), ("labels",), ("loss_mask",))
    kinds = ("token_types",) if model.num_token_types else ()
    sentence = ("sentence_labels",) if model.predicts_sentences else ()
    masks = ("loss_mask", "sentence_mask") if model.predicts_sentences else ("loss_mask",)
    return Fields(("tokens", "position_ids", *kinds), ("labels", *sentence), masks)
