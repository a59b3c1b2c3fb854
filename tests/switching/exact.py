"""Exact solutions by scipy, slow and simple, that tests and benchmarks compare with."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def exact_assignment(scores_NE: Tensor) -> Tensor:
    """Balanced labels [N] of the largest possible sum: every expert's column is repeated once per place."""
    num_neurons, num_experts = scores_NE.shape
    size = num_neurons // num_experts
    places = linear_sum_assignment(np.repeat(scores_NE.double().numpy(), size, axis=1), maximize=True)[1]
    return torch.from_numpy(places // size)


def exact_kmeans(rows_NH: Tensor, labels: Tensor, num_experts: int) -> float:
    """Inertia of k-means on normalised rows with an exact assignment in every round, as k-means-constrained has it."""
    rows_NH = F.normalize(rows_NH.double(), dim=1)
    lowest = math.inf
    while True:
        means_EH = torch.stack([rows_NH[labels == expert].mean(0) for expert in range(num_experts)])
        inertia = float((rows_NH - means_EH[labels]).square().sum())
        if inertia >= lowest:
            return lowest
        lowest, labels = inertia, exact_assignment(-torch.cdist(rows_NH, means_EH).square())
