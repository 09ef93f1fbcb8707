"""The training of a component mask, and what it cannot be trained on."""

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.mechanisms.desiderata import Desideratum
from analyses.mechanisms.mixing import Mixture

LOSSES = ("logit", "log-probability", "logit difference")
"""The target that training raises: the released code takes the logit."""


def learn(
    data: Mixture,
    penalty: float,
    loss: str,
    lr: float,
    epochs: int,
    batch_size: int,
    seed: int,
    advance: Callable[[int], None],
) -> Iterator[Float[Tensor, "group component"]]:
    """The mask after each epoch."""
    n = len(data.examples)
    generator = torch.Generator().manual_seed(seed)
    shape = (len(data.examples.groups), len(data.components.names))
    mask = torch.ones(shape, requires_grad=True)
    adam = torch.optim.Adam([mask], lr=lr)
    for _ in range(epochs):
        order = torch.randperm(n, generator=generator).tolist()
        for start in range(0, n, batch_size):
            batch = order[start : start + batch_size]
            batch.sort(key=lambda i: len(data.runs.ids[i]))  # little padding in a pass
            adam.zero_grad()
            for at in range(0, len(batch), data.micro):
                rows = batch[at : at + data.micro]
                logits = data.logits(rows, mask, gradients=True)
                (-_target(data, rows, logits, loss).sum() / len(batch)).backward()
            (penalty * (1 - mask).sum()).backward()
            if mask.grad is None or not bool(mask.grad.isfinite().all()):
                raise ValueError(
                    f"the gradient of the mask of {data.examples.name!r} is NaN or infinite: load "
                    "the model in float32, or leave the prompts out that overflow"
                )
            adam.step()
            with torch.no_grad():
                mask.clamp_(0, 1)
            advance(1)
        yield mask.detach().clone()


def _target(data: Mixture, rows: Sequence[int], logits: Tensor, loss: str) -> Tensor:
    """What is raised, by row."""
    scores = logits if loss != "log-probability" else logits.log_softmax(-1)
    found = scores.gather(1, data.labels[rows][:, None])[:, 0]
    if loss == "logit difference":
        others = torch.tensor(data.examples.others)[rows]
        found = found - scores.gather(1, others[:, None])[:, 0]
    return found


def check(
    train: Desideratum,
    validation: Desideratum,
    test: Desideratum,
    penalties: Sequence[float],
    loss: str,
    lr: float,
    epochs: int,
    batch_size: int,
) -> None:
    parts = {"training": train, "validation": validation, "test": test}
    for what, part in parts.items():
        if not len(part):
            raise ValueError(f"the {what} part of {part.name!r} is empty: give more topics")
        if [name for name, _ in part.groups] != [name for name, _ in train.groups]:
            raise ValueError(
                f"the {what} part has position groups {[n for n, _ in part.groups]}, training "
                f"{[n for n, _ in train.groups]}: name the same ones"
            )
        if loss == "logit difference" and not part.others:
            raise ValueError(
                f"loss='logit difference' compares each label with another token: give "
                f"desideratum(..., others=...) for the {what} part"
            )
        for other, given in parts.items():
            shared = sorted(set(part.topics) & set(given.topics))
            if other != what and shared:
                raise ValueError(
                    f"the {what} and {other} parts share topic {shared[0]!r}: split by topics "
                    "(Desideratum.split)"
                )
    if loss not in LOSSES:
        raise ValueError(f"loss={loss!r}: choose {', '.join(map(repr, LOSSES))}")
    if not penalties or any(not p >= 0 for p in penalties):
        raise ValueError(f"penalties {list(penalties)}: give at least one lambda, none below 0")
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"{epochs} epochs of batches of {batch_size}: give at least 1 of each")
    steps = -(-len(train) // batch_size) * epochs
    if steps * lr <= 0.5:
        raise ValueError(
            f"{steps} steps of size {lr} cannot move a mask from 1 below one half: give more "
            "epochs, smaller batches or a larger lr"
        )
