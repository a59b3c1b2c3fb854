"""Random numbers that depend on what they are for, and on nothing drawn before."""

import hashlib

import torch


def generator_for(key: str) -> torch.Generator:
    """A generator (CPU) seeded by a text: the same numbers on every rank and layout."""
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
