"""The training loop that LoFiT and what it is compared with share, and the curve it leaves."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probes import figures
from probes.model import HookedModel
from probes.progress import progress as show
from probes.prompts import prompts_hash
from probes.results import Record, Result
from steering.preferences import DPO, SFT, Answers, Loss, Preference, encode, joined
from steering.replay import CACHE_LIMIT, Replay

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

CLIP = 1.0
"""Norm to which gradients are cut."""


@dataclass(frozen=True)
class Training:
    """How to train: AdamW, learning rate falling linearly to 0, gradients cut to norm 1.

    The defaults are LoFiT's for step v on TruthfulQA with Llama-2-7B (Yin et al. 2024, appendix;
    weight decay as in the released code).
    """

    loss: Loss = field(default_factory=DPO)
    """`DPO(beta)`, `SFT()` or a function of `Answers`."""
    lr: float = 1e-2
    epochs: int = 5
    batch_size: int = 8
    weight_decay: float = 0.0
    noise: float = 1e-3
    """Standard deviation of the numbers that training starts from."""
    seed: int = 42
    """Of the starting numbers and the order of examples."""
    patience: int | None = None
    """With validation examples: epochs without improvement after which training ends, and the
    best epoch is kept. None: all epochs are made and the last is kept, as published."""

    def __post_init__(self) -> None:
        for name in ("lr", "epochs", "batch_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: give a number above 0")
        for name in ("weight_decay", "noise"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: give 0 or more")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience is {self.patience}: give 1 or more epochs, or None")

    @property
    def settings(self) -> dict[str, Any]:
        """All of it as plain values, for records."""
        return {**dataclasses.asdict(self), "loss": str(self.loss)}


@dataclass(frozen=True)
class TrainingCurve(Result):
    """How a training went."""

    losses: Float[Tensor, " step"]
    """Task loss of each step's batch before its update, in nats, penalties not included."""
    validation: Float[Tensor, " epoch"]
    """Loss of the validation examples, as one batch, before training and after each epoch; empty
    without."""
    kept_epoch: int
    """Epochs after which the kept parameters were reached."""
    n_parameters: int
    """Numbers that were trained."""
    first_layer: int
    """Lowest block that ran in every step; what enters it was computed once."""
    cache_bytes: int
    """Memory that the kept hidden states took."""
    replay_error: float
    """Largest relative error of an answer's logits against plain forward passes."""
    notes: tuple[str, ...]

    def frame(self) -> "pd.DataFrame":
        """One row a step: step, loss."""
        import pandas as pd

        return pd.DataFrame({"step": range(1, len(self.losses) + 1), "loss": self.losses.numpy()})

    def plot_losses(self, ax: "Axes | None" = None) -> "Axes":
        """Loss of each step, its running mean and, if measured, the validation loss."""
        ax = figures.axes(ax)
        steps = torch.arange(1, len(self.losses) + 1)
        width = max(1, len(self.losses) // 12)
        mean = self.losses.double().unfold(0, width, 1).mean(-1)
        with figures.theme():
            ax.plot(steps, self.losses, color=figures.PALETTE[7], lw=0.7, label="batch")
            ax.plot(steps[width - 1 :], mean, color=figures.PALETTE[0], label="running mean")
            if len(self.validation):
                at = torch.linspace(0, len(self.losses), len(self.validation))
                ax.plot(at, self.validation, color=figures.PALETTE[1], marker="s", label="held out")
            ax.set(xlabel="step", ylabel="loss (nats)", title=f"{self.n_parameters} numbers")
            ax.locator_params(axis="x", integer=True)
            ax.legend()
        return ax

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """`plot_losses`."""
        return self.plot_losses(ax)

    def __str__(self) -> str:
        tail = self.losses[-max(1, len(self.losses) // 12) :]
        return (
            f"{self.n_parameters} numbers trained in {len(self.losses)} steps, "
            f"loss {float(self.losses[0]):.3f} to {float(tail.mean()):.3f}"
        )


class Task:
    """Examples ready to be trained on: their replay, reference, batches and losses."""

    def __init__(
        self,
        model: HookedModel,
        examples: Sequence[Preference],
        training: Training,
        first: int = 0,
        cache_limit: int = CACHE_LIMIT,
    ) -> None:
        chosen, rejected = encode(model.template, examples)
        if rejected is None and isinstance(training.loss, DPO):
            raise ValueError("DPO needs a rejected answer in every example: give one, or use SFT")
        if isinstance(training.loss, SFT):
            rejected = None
        self.n = len(chosen)
        self.hash = prompts_hash([*chosen, *(rejected or [])])
        self._two = rejected is not None
        self._n_chosen = torch.tensor([len(r.ids) - r.n_prompt for r in chosen])
        self._lengths = [len(r.ids) for r in chosen]
        self.replay = Replay(model, [*chosen, *(rejected or [])], first, cache_limit)
        self._reference = self.replay.all_logprobs().detach() if self._two else None

    def answers(self, indices: Sequence[int]) -> Answers:
        """Log-probabilities of these examples' answers under the model as it is now."""
        chosen = list(indices)
        if not self._two:
            found = self.replay.logprobs(chosen)
            return Answers(found, self._n_chosen[chosen].to(found.device))
        both = chosen + [i + self.n for i in chosen]
        found = self.replay.logprobs(both)
        assert self._reference is not None
        c, r = found.split(len(chosen))
        c_ref, r_ref = self._reference[both].split(len(chosen))
        return Answers(c, self._n_chosen[chosen].to(found.device), r, c_ref, r_ref)

    def batches(self, size: int, generator: torch.Generator) -> Iterator[list[int]]:
        """All examples once in random order. Where rows are padded, batches are of one length."""
        order = torch.randperm(self.n, generator=generator).tolist()
        if not self.replay.packed:
            pool = 16 * size
            for start in range(0, self.n, pool):
                order[start : start + pool] = sorted(
                    order[start : start + pool], key=lambda i: self._lengths[i]
                )
        chunks = [order[start : start + size] for start in range(0, self.n, size)]
        if not self.replay.packed:
            chunks = [chunks[i] for i in torch.randperm(len(chunks), generator=generator).tolist()]
        yield from chunks

    @torch.no_grad()
    def loss(self, loss: Loss, batch_size: int = 32) -> float:
        """Loss of all examples as one batch, whatever chunks they are run in."""
        order = sorted(range(self.n), key=lambda i: self._lengths[i])
        parts = [
            self.answers(order[start : start + batch_size])
            for start in range(0, self.n, batch_size)
        ]
        return float(loss(joined(parts)))


@dataclass(frozen=True)
class Trained:
    """What `train` gives back beside the parameters it leaves trained."""

    losses: Float[Tensor, " step"]
    validation: Float[Tensor, " epoch"]
    kept_epoch: int


def train(
    parameters: Sequence[nn.Parameter],
    task: Task,
    training: Training,
    *,
    validation: Task | None = None,
    penalty: Callable[[], Tensor] | None = None,
    stepping: Callable[[], AbstractContextManager[None]] = nullcontext,
    progress: bool = True,
) -> Trained:
    """Train the parameters in place; gradients are formed for them alone.

    `stepping` is entered around the forward pass of each step and not around validation: for
    dropout. The generator of the order of examples is seeded with the training's seed, that of the
    starting numbers with the same seed by whoever draws them.
    """
    if training.patience is not None and validation is None:
        raise ValueError("patience needs validation examples: give some, or patience=None")
    generator = torch.Generator().manual_seed(training.seed)
    each = math.ceil(task.n / training.batch_size)
    total = each * training.epochs
    optimiser = torch.optim.AdamW(
        list(parameters), lr=training.lr, eps=1e-8, weight_decay=training.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / total)
    losses: list[float] = []
    held: list[float] = [] if validation is None else [validation.loss(training.loss)]
    best, state = 0, [p.detach().clone() for p in parameters]
    with show(total, "training", progress) as advance:
        for epoch in range(1, training.epochs + 1):
            for batch in task.batches(training.batch_size, generator):
                with stepping():
                    loss = training.loss(task.answers(batch))
                losses.append(loss.item())
                if not math.isfinite(losses[-1]):
                    raise RuntimeError(
                        f"the loss became {losses[-1]} in step {len(losses)}: use a smaller lr "
                        f"(it is {training.lr:g}), or float32"
                    )
                whole = loss if penalty is None else loss + penalty()
                gradients = torch.autograd.grad(whole, list(parameters))
                for p, gradient in zip(parameters, gradients, strict=True):
                    p.grad = gradient
                nn.utils.clip_grad_norm_(parameters, CLIP)
                optimiser.step()
                schedule.step()
                advance(1)
            if validation is None:
                best = epoch
                continue
            held.append(validation.loss(training.loss))
            if training.patience is None or held[-1] < min(held[:-1]):
                best, state = epoch, [p.detach().clone() for p in parameters]
            elif epoch - best >= training.patience:
                break
    if validation is not None:
        with torch.no_grad():
            for p, kept in zip(parameters, state, strict=True):
                p.copy_(kept)
    return Trained(torch.tensor(losses), torch.tensor(held), best)


def curve_fields(
    trained: Trained, parameters: Sequence[nn.Parameter], task: Task
) -> dict[str, Any]:
    """The fields of a `TrainingCurve` but its record."""
    return {
        "losses": trained.losses,
        "validation": trained.validation,
        "kept_epoch": trained.kept_epoch,
        "n_parameters": sum(p.numel() for p in parameters),
        "first_layer": task.replay.first,
        "cache_bytes": task.replay.cache_bytes,
        "replay_error": task.replay.error,
        "notes": task.replay.notes,
    }


def record_of(model: HookedModel, task: Task, training: Training, **settings: Any) -> Record:
    """How a tuning was made."""
    return Record(
        models=(model.name,),
        fingerprints=(model.fingerprint,),
        template_hash=model.template.hash,
        prompts_hash=task.hash,
        seeds=(training.seed,),
        dtype=str(model.dtype).removeprefix("torch."),
        engine="transformers",
        settings={"training": training.settings, "examples": task.n, **settings},
    )
