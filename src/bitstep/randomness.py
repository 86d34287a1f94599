"""Random choices as pure functions of (seed, purpose, number): nothing to save, and the same after a resume."""

from __future__ import annotations

import zlib
from functools import lru_cache

import torch
from torch import Tensor


def generator(seed: int, purpose: str, number: int) -> torch.Generator:
    """A CPU generator for one random choice."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{purpose}/{number}".encode()))


def draw(population: int, count: int, seed: int, purpose: str, iteration: int) -> Tensor:
    """Batch number ``iteration`` of indices below ``population`` ``[count]``: every pass over the population visits
    each index once, in a new order."""
    places = [divmod(iteration * count + i, population) for i in range(count)]
    return torch.stack([_order(population, seed, purpose, epoch)[place] for epoch, place in places])


@lru_cache(maxsize=4)
def _order(population: int, seed: int, purpose: str, epoch: int) -> Tensor:
    return torch.randperm(population, generator=generator(seed, purpose, epoch))
