"""Rows that hold a contrast, the most important first: what `train_subspace` makes a basis of."""

import torch
from jaxtyping import Float
from torch import Tensor


def axes_of_pairs(
    positive: Float[Tensor, "pair width"], negative: Float[Tensor, "pair width"], rank: int
) -> Float[Tensor, "rank width"]:
    """Principal axes of the paired differences about 0, so that their mean is not removed."""
    differences = (positive - negative).double()
    if rank > len(differences):
        raise ValueError(f"rank {rank} of {len(differences)} pairs: give as many pairs, or more")
    return _widest(differences, rank, "of the paired differences")


def mean_and_axes(
    positive: Float[Tensor, "positive width"],
    negative: Float[Tensor, "negative width"],
    rank: int,
) -> Float[Tensor, "rank width"]:
    """The difference of means, then the widest axes, across it, along which classes vary inside."""
    high, low = positive.double(), negative.double()
    mean = (high.mean(0) - low.mean(0))[None]
    unit = mean / mean.norm()
    within = torch.cat([high - high.mean(0), low - low.mean(0)])
    within = within - (within @ unit.T) @ unit
    return torch.cat([mean, _widest(within, rank - 1, "across it inside the classes")])


def _widest(rows: Float[Tensor, "row width"], n: int, where: str) -> Float[Tensor, "axis width"]:
    """The first `n` principal axes; an axis along which nothing varies is none."""
    _, S, Vh = torch.linalg.svd(rows, full_matrices=False)
    found = int((S[0] * torch.finfo(torch.float32).eps < S).sum())  # the rows were float32
    if n > found:
        raise ValueError(
            f"{n} axes {where} were asked for, the rows vary along {found}: ask for a smaller "
            "rank, or give more prompts"
        )
    return Vh[:n]
