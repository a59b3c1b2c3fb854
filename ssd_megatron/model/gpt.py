"""GPT: a decoder-only Transformer as one list of layers (embedding, blocks, head)."""

from torch import Tensor, nn

from ssd_megatron.config.schema import SsdMegatronConfig
from ssd_megatron.ffn.switchable import SwitchableFFN
from ssd_megatron.model.blocks import TransformerBlock, ffn_settings, transformer_config
from ssd_megatron.model.embedding import Embedding
from ssd_megatron.model.heads import LanguageModelHead, token_losses
from ssd_megatron.model.init import initialize_parameters


class GPT(nn.Module):
    """The whole model on one pipeline stage. Parameter names are the logical state's names.

    Args:
        backend: kernels of sparse mode, as `ffn.kernels.choose_backend` resolved it.
    """

    def __init__(self, config: SsdMegatronConfig, backend: str) -> None:
        super().__init__()
        model = config.model
        mcore = transformer_config(model)
        ffn = ffn_settings(model, config.ssd, backend)
        recompute = config.training.recompute == "full"
        self.embedding = Embedding(mcore, model)
        self.blocks = nn.ModuleList(
            TransformerBlock(mcore, model, ffn, index, recompute) for index in range(model.num_layers)
        )
        self.head = LanguageModelHead(model, self.embedding.word.weight)
        initialize_parameters(self, seed=config.seed, std=model.init_std, num_layers=model.num_layers)

    @property
    def ffns(self) -> dict[str, SwitchableFFN]:
        """The feed-forward networks by the name of their module, first layer first."""
        return {name: module for name, module in self.named_modules() if isinstance(module, SwitchableFFN)}

    def logits(self, tokens_bs: Tensor, position_ids_bs: Tensor) -> Tensor:
        """Logits [s, b, padded vocabulary] of token ids [b, s]."""
        x_sbh = self.embedding(tokens_bs, position_ids_bs)
        for block in self.blocks:
            x_sbh = block(x_sbh)
        logits_sbv: Tensor = self.head(x_sbh)
        return logits_sbv

    def forward(self, tokens_bs: Tensor, position_ids_bs: Tensor, labels_bs: Tensor) -> Tensor:
        """Loss of each token [b, s], fp32."""
        return token_losses(self.logits(tokens_bs, position_ids_bs), labels_bs)
