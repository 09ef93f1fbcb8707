"""One vector a prompt from all layers: a weighted mean of layers, its weights learned or equal.

The pooled vector is h = sum_l alpha_l h_l with alpha on the simplex, the softmax or the sparsemax
of one free number a layer that starts at 0, so that training starts from equal weights. The paper
behind it (arXiv 2506.13901) states neither its loss nor how it is trained. Ours, per minibatch of
whole topics, with d_ij the distance of two pooled rows over the root mean square of all distances
in the minibatch:

    mean over pairs of one label d_ij^2  +  mean over pairs of two labels max(0, 1 - d_ij)^2

by Adam with step 0.01. The margin 1 is our choice: it is the typical distance in the batch. The
distances are quadratic forms in alpha, whose coefficients are made once; so hundreds of labellings
(a shuffled-label null) are fitted together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probes.results import check_finite
from probes.splits import codes

Normaliser = Literal["softmax", "sparsemax"]

MARGIN = 1.0
STEP = 1e-2
MOST_ROWS = 256
"""Training rows whose pairs are held; of more, whole topics are drawn by the seed."""


class Scale(NamedTuple):
    """What makes layers comparable, from training rows."""

    mean: Float[Tensor, "layer d_model"]
    size: Float[Tensor, " layer"]
    """Root mean square over rows of the distance to the mean; 1 where a layer is constant."""


@dataclass(frozen=True)
class Pooling:
    """Layer weights for each labelling and seed, with the scale they belong to."""

    alpha: Float[Tensor, "fit seed layer"]
    """Non-negative, adding up to 1 over layers."""
    loss: Float[Tensor, "fit seed"]
    """Mean loss over the last tenth of the steps."""
    scale: Scale


def scale_of(rows: Float[Tensor, "example layer d_model"]) -> Scale:
    """Each layer's mean and size. Without it late layers, whose vectors are long, would win."""
    check_finite(rows, "the activations")
    mean = torch.stack([layer.double().mean(0) for layer in rows.unbind(1)])
    square = torch.stack(
        [(x.double() - m).square().sum(1).mean() for x, m in zip(rows.unbind(1), mean, strict=True)]
    )
    return Scale(mean, torch.where(square > 0, square.sqrt(), torch.ones_like(square)))


def scaled(
    rows: Float[Tensor, "example layer d_model"], scale: Scale
) -> Float[Tensor, "example layer d_model"]:
    """Rows less the mean over the size of their layer, float32."""
    return ((rows.double() - scale.mean) / scale.size[:, None]).float()


def pooled(
    rows: Float[Tensor, "example layer d_model"], alpha: Float[Tensor, " layer"]
) -> Float[Tensor, "example d_model"]:
    """Weighted mean of the layers of scaled rows."""
    return torch.einsum("l,eld->ed", alpha.to(rows.dtype), rows)


def uniform(layers: int) -> Float[Tensor, " layer"]:
    """Equal weights, the baseline of every learned one."""
    return torch.full((layers,), 1 / layers)


def sparsemax(w: Float[Tensor, "*fit layer"]) -> Float[Tensor, "*fit layer"]:
    """The point of the simplex nearest to w, often with zeros (Martins and Astudillo 2016, alg.
    1): max(w - t, 0) with t such that it adds up to 1."""
    ordered = w.sort(-1, descending=True).values
    ranks = torch.arange(1, w.shape[-1] + 1, device=w.device, dtype=w.dtype)
    total = ordered.cumsum(-1)
    support = (1 + ranks * ordered > total).sum(-1, keepdim=True)
    threshold = (total.gather(-1, support - 1) - 1) / support
    return (w - threshold).clamp(min=0)


def fit_pooling(
    rows: Float[Tensor, "example layer d_model"],
    labels: Bool[Tensor, "example fit"],
    topics: Sequence[str],
    *,
    normaliser: Normaliser = "softmax",
    steps: int = 500,
    seeds: int = 5,
    seed: int = 0,
    batch: int = 32,
) -> Pooling:
    """Learn layer weights on training rows for each column of labels.

    A seed decides the minibatches (about `batch` rows of whole topics), which all labellings see
    alike. Of more than `MOST_ROWS` rows, that many are used.
    """
    if len(labels) != len(rows) or len(topics) != len(rows):
        raise ValueError(
            f"{len(rows)} rows came with {len(labels)} labels and {len(topics)} topics: give one "
            "of each for every row"
        )
    if bool(labels.all(0).any()) or not bool(labels.any(0).all()):
        raise ValueError(
            "a labelling of the training rows holds one class only: both classes are needed"
        )
    if steps < 1 or seeds < 1:
        raise ValueError(f"{steps} steps and {seeds} seeds were asked: ask for at least 1 of each")
    scale = scale_of(rows)
    numbers, known = codes(topics)
    generator = torch.Generator().manual_seed(seed)
    used = _some(numbers, len(known), generator)
    x = scaled(rows[used], scale)
    labels, numbers = labels[used], codes([topics[i] for i in map(int, used)])[0]
    forms = _forms(x)
    found = [
        _descend(forms, labels, numbers, normaliser, steps, batch, seed + 1 + s)
        for s in range(seeds)
    ]
    return Pooling(
        torch.stack([alpha for alpha, _ in found], 1),
        torch.stack([loss for _, loss in found], 1),
        scale,
    )


def _some(numbers: Tensor, topics: int, generator: torch.Generator) -> Int[Tensor, " row"]:
    order = torch.randperm(topics, generator=generator)
    sizes = torch.bincount(numbers, minlength=topics)[order].cumsum(0)
    kept = order[: max(2, int((sizes <= MOST_ROWS).sum()))]
    return torch.isin(numbers, kept).nonzero().flatten()


class _Forms(NamedTuple):
    """Squared distances of all pairs as quadratic forms in alpha."""

    values: Float[Tensor, "pair product"]
    number: Int[Tensor, "row row"]
    """Row of `values` of a pair."""
    left: Int[Tensor, " product"]
    right: Int[Tensor, " product"]

    def at(self, alpha: Tensor) -> Float[Tensor, "fit product"]:
        twice = torch.where(self.left == self.right, 1.0, 2.0)
        return alpha[:, self.left] * alpha[:, self.right] * twice


def _forms(x: Float[Tensor, "row layer d_model"]) -> _Forms:
    n, layers, _ = x.shape
    left, right = torch.triu_indices(layers, layers)
    i, j = torch.triu_indices(n, n, 1)
    number = torch.zeros(n, n, dtype=torch.long)
    number[i, j] = number[j, i] = torch.arange(len(i))
    values = torch.empty(len(i), len(left))
    for start in range(0, len(i), 512):
        some = slice(start, start + 512)
        apart = x[i[some]] - x[j[some]]
        values[some] = (apart @ apart.transpose(1, 2))[:, left, right]
    return _Forms(values, number, left, right)


def _descend(
    forms: _Forms,
    labels: Tensor,
    numbers: Tensor,
    normaliser: Normaliser,
    steps: int,
    batch: int,
    seed: int,
) -> tuple[Float[Tensor, "fit layer"], Float[Tensor, " fit"]]:
    generator = torch.Generator().manual_seed(seed)
    members = [(numbers == g).nonzero().flatten() for g in range(int(numbers.max()) + 1)]
    n_topics = max(2, round(batch * len(members) / len(numbers)))
    n_layers = int(forms.left.max()) + 1
    simplex = sparsemax if normaliser == "sparsemax" else (lambda w: w.softmax(-1))
    w = torch.zeros(labels.shape[1], n_layers, requires_grad=True)
    adam = torch.optim.Adam([w], lr=STEP)
    late: list[Tensor] = []
    for step in range(steps):
        drawn = torch.randperm(len(members), generator=generator)[:n_topics]
        rows = torch.cat([members[g] for g in drawn.tolist()])
        i, j = torch.triu_indices(len(rows), len(rows), 1)
        i, j = rows[i], rows[j]
        same = (labels[i] == labels[j]).T.float()
        square = forms.at(simplex(w)) @ forms.values[forms.number[i, j]].T
        loss = contrastive(square.clamp(min=0), same)
        adam.zero_grad()
        loss.sum().backward()  # labellings do not touch each other's weights
        adam.step()
        if step >= steps - max(1, steps // 10):
            late.append(loss.detach())
    return simplex(w.detach()), torch.stack(late).mean(0)


def contrastive(
    square: Float[Tensor, "fit pair"], same: Float[Tensor, "fit pair"], margin: float = MARGIN
) -> Float[Tensor, " fit"]:
    """The loss above from squared distances; 0 where each class is a point and they are apart."""
    square = square / square.mean(1, keepdim=True).clamp(min=1e-12)
    near = (margin - square.clamp(min=1e-12).sqrt()).clamp(min=0).square()
    alike = (square * same).sum(1) / same.sum(1).clamp(min=1)
    apart = (near * (1 - same)).sum(1) / (1 - same).sum(1).clamp(min=1)
    return alike + apart
