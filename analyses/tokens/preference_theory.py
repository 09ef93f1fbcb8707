"""What preference training can make of a pair: theorems 3.1 and 4.1 of arXiv 2405.19534."""

import torch
from jaxtyping import Float
from torch import Tensor

CERTAIN = 0.001
"""A pair on which all raters agree counts as if this share disagreed, or its odds were infinite."""


def idealised_margin(
    reference: Float[Tensor, " pair"], shares: Float[Tensor, " pair"], beta: float
) -> Float[Tensor, " pair"]:
    """Margin, in nats, that perfect preference training gives a pair (theorem 3.1):
    that of the reference plus log(a / (1 - a)) / beta, a the share of raters."""
    a = shares.double().clamp(CERTAIN, 1 - CERTAIN)
    return reference.double() + torch.logit(a) / beta


def loss_bound(wrongness: Float[Tensor, " pair"], beta: float) -> Float[Tensor, " pair"]:
    """-log sigmoid(beta c): a pair is ranked right exactly where its DPO loss is at most this."""
    return -torch.nn.functional.logsigmoid(beta * wrongness.double())
