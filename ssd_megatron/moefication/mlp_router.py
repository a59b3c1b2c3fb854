"""The router that MoEfication trains: two small layers that foresee which experts' neurons will fire.

Source: MoEfication (arXiv 2110.01786). Shapes: T tokens, H hidden, E experts.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_megatron.ffn.router_kinds import mlp_scores

# The paper's recipe.
BATCH = 512
LEARNING_RATE = 0.01
EPOCHS = 30


@dataclass(frozen=True)
class MlpRouter:
    """Weights of the router kind `mlp`.

    Attributes:
        weight: [E, H].
        mix: [E, E].
    """

    weight: Tensor
    mix: Tensor

    def scores(self, x_TH: Tensor) -> Tensor:
        """[T, E]."""
        return mlp_scores(x_TH, self.weight, self.mix)


def train_mlp_router(
    x_TH: Tensor, mass_TE: Tensor, held_out: int, directions_EH: Tensor, *, epochs: int = EPOCHS, seed: int
) -> MlpRouter:
    """Train with binary cross entropy against each expert's share of the largest mass of its token; of all epochs the
    one that is best on the held-out tokens counts.

    Args:
        x_TH: inputs of the network.
        mass_TE: what the neurons of each expert give together (`router_kinds.activation_mass`).
        held_out: so many tokens, the last, are not trained on.
        directions_EH: mean normalised row of each expert: where the first layer starts, the second at the identity.
    """
    assert 0 < held_out < len(x_TH), (held_out, len(x_TH))
    weight = directions_EH.float().clone().requires_grad_()
    mix = torch.eye(len(weight), device=weight.device).requires_grad_()
    targets_TE = mass_TE / mass_TE.amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    trained = len(x_TH) - held_out
    optimizer = torch.optim.Adam([weight, mix], lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(seed)
    best, best_loss = MlpRouter(weight.detach().clone(), mix.detach().clone()), float("inf")
    for _ in range(epochs):
        for part in torch.split(torch.randperm(trained, generator=generator).to(x_TH.device), BATCH):
            optimizer.zero_grad(set_to_none=True)
            loss = _loss(weight, mix, x_TH[part], targets_TE[part])
            torch.autograd.backward(loss)
            optimizer.step()
        with torch.no_grad():
            now = float(_loss(weight, mix, x_TH[trained:], targets_TE[trained:]))
        if now < best_loss:
            best, best_loss = MlpRouter(weight.detach().clone(), mix.detach().clone()), now
    return best


def _loss(weight_EH: Tensor, mix_EE: Tensor, x_TH: Tensor, targets_TE: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(mlp_scores(x_TH, weight_EH, mix_EE), targets_TE)
