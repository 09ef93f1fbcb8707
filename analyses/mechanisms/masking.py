"""Desiderata-based component masking (DCM): which components carry what a desideratum asks for.

Davies et al. 2023 (arXiv 2307.03637), as used by Prakash et al. 2024 (arXiv 2402.14811, section 5).
A mask m in [0, 1] is learned for every component c and position group g of the base run,

    a_base <- m a_base + (1 - m) a_source    at the group's tokens,
    loss = - mean target(label) + lambda sum (1 - m),

by Adam from m = 1, clamped after every step and rounded in the end. Components with m = 0 carry
the information. What the released code does otherwise:

- its base index is taken from the query sentence, so that base and source may ask for the same
  thing: `desideratum` compares the indices given and refuses equal ones;
- it evaluates validation examples at the training batch's token positions: here every example
  keeps its own;
- box labels are encoded without the leading space, so that the right answer never counts:
  `desideratum` reads a label where it continues the prompt, and refuses what is not one token;
- of masks with equal validation accuracy it keeps the one with *more* heads. Here the one with
  fewer wins: components that change no answer are not shown to carry anything.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from analyses.mechanisms import masking_figure
from analyses.mechanisms.desiderata import Desideratum
from analyses.mechanisms.mask_training import check, learn
from analyses.mechanisms.mixing import Components, Mixture
from analyses.patching.patch import few
from probes.model import HookedModel
from probes.progress import progress as show
from probes.prompts import prompts_hash
from probes.results import Record, Result
from probes.scores import Interval, wilson
from probes.sites import Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class ComponentMask(Result):
    """Components that, taken from the source run, make the base run answer as expected."""

    name: str
    """The desideratum."""
    origin: str
    """Where the values come from."""
    groups: tuple[str, ...]
    """Position groups."""
    components: tuple[str, ...]
    mask: Float[Tensor, "group component"]
    """Learned, before rounding: 1 keeps the base's value, 0 takes the source's."""
    patched: Bool[Tensor, "group component"]
    """Mask below one half: what is taken from the source."""
    loss: str
    penalty: float
    """The lambda chosen on validation examples."""
    epoch: int
    """The epoch chosen, counted from 1; 0: the empty mask it starts from."""
    history: tuple[tuple[float, int, int, int, int], ...]
    """(lambda, epoch, components patched, training hits, validation hits) of every candidate."""
    sizes: tuple[int, int, int]
    """Training, validation and test examples."""
    hits: tuple[int, int, int]
    """Examples of each part answered with the label under the chosen mask."""
    unpatched: tuple[int, int, int]
    """The same without any patch."""
    everything: int
    """Test examples answered with the label when every component is taken from the source."""
    null_hits: tuple[int, ...]
    """Test examples answered with the label under random masks that patch as many components of
    each group."""
    notes: tuple[str, ...]

    @property
    def selected(self) -> tuple[tuple[str, str], ...]:
        """Position group and component of everything taken from the source."""
        return tuple(
            (self.groups[g], self.components[c]) for g, c in self.patched.nonzero().tolist()
        )

    @property
    def accuracy(self) -> Interval:
        """Share of test examples answered with the label, with its 95 % Wilson interval."""
        return wilson(self.hits[2], self.sizes[2])

    @property
    def baseline(self) -> Interval:
        """The same without any patch."""
        return wilson(self.unpatched[2], self.sizes[2])

    @property
    def null_95(self) -> float:
        """95th percentile of the accuracy of random masks of the same size."""
        if not self.null_hits:
            return float("nan")
        shares = torch.tensor(self.null_hits, dtype=torch.float64) / self.sizes[2]
        return float(shares.quantile(0.95))

    @property
    def claimed(self) -> bool:
        """Whether the interval of the accuracy lies above the null's 95th percentile."""
        return self.accuracy.low > self.null_95

    def frame(self) -> "pd.DataFrame":
        """One row a position group and component."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "group": group,
                    "component": component,
                    "mask": float(self.mask[g, c]),
                    "patched": bool(self.patched[g, c]),
                }
                for g, group in enumerate(self.groups)
                for c, component in enumerate(self.components)
            ]
        )

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Test accuracy unpatched, under random masks, under the mask, and with everything."""
        return masking_figure.accuracies(self, ax)

    def plot_mask(self, group: str | None = None, ax: "Axes | None" = None) -> "Axes":
        """What is taken from the source at one position group, layer by head or part."""
        return masking_figure.components(self, group or self.groups[0], ax)

    def __str__(self) -> str:
        n = int(self.patched.sum())
        if not n:
            return (
                f"{self.name}: no component is taken from {self.origin}; unpatched accuracy "
                f"{self.baseline.value:.0%} of {self.sizes[2]}"
            )
        a = self.accuracy
        said = (
            f"{self.name}: {n} of {self.patched.numel()} components from {self.origin} give the "
            f"label in {a.value:.0%} [{100 * a.low:.0f}, {100 * a.high:.0f}] of {self.sizes[2]} "
            f"test examples, unpatched {self.baseline.value:.0%}; {len(self.null_hits)} random "
            f"masks at most {self.null_95:.0%}"
        )
        return said + ("" if self.claimed else ": not told from random masks")


def mask_components(
    model: HookedModel,
    train: Desideratum,
    validation: Desideratum,
    test: Desideratum,
    parts: Sequence[str] = ("head_out",),
    *,
    source: HookedModel | None = None,
    layers: Sequence[int] | None = None,
    subspace: tuple[str | Site, Tensor] | None = None,
    penalties: Sequence[float] = (0.01,),
    loss: str = "logit",
    lr: float = 0.1,
    epochs: int = 2,
    batch_size: int = 32,
    draws: int = 20,
    seed: int = 0,
    progress: bool = True,
) -> ComponentMask:
    """Learn a mask on `train`, choose lambda and epoch on `validation`, report on `test`.

    Components are all heads or whole parts named in `parts`, in `layers` (all); or, with
    `subspace=(site, directions)`, the coefficients along orthonormal directions of one site.
    Values come from `source` (the model itself) reading the source prompts. `penalties` are the
    lambdas tried, in units of the target for each component taken from the source. Of candidates
    with equal validation accuracy the one with fewest components wins, the empty mask included.
    The parts may not share topics. Needs the plain engine.
    """
    check(train, validation, test, penalties, loss, lr, epochs, batch_size)
    components = Components.of(model, parts, layers, subspace)
    data = [
        Mixture(model, part, components, source, batch_size) for part in (train, validation, test)
    ]
    shape = (len(train.groups), len(components.names))
    nothing = torch.zeros(shape, dtype=torch.bool)
    known: dict[tuple[int, bytes], int] = {}

    def hits(part: int, patched: Tensor) -> int:
        key = (part, patched.numpy().tobytes())
        if key not in known:
            known[key] = data[part].hits(patched)
        return known[key]

    steps = -(-len(train) // batch_size) * epochs
    candidates = [(0.0, 0, torch.ones(shape), nothing)]
    with show(len(penalties) * steps + draws, f"masking {model.label}", progress) as advance:
        for penalty in penalties:
            for epoch, mask in enumerate(
                learn(data[0], penalty, loss, lr, epochs, batch_size, seed, advance), 1
            ):
                candidates.append((penalty, epoch, mask, mask < 0.5))
        penalty, epoch, mask, patched = max(
            candidates, key=lambda c: (hits(1, c[3]), -int(c[3].sum()))
        )
        null = []
        generator = torch.Generator().manual_seed(seed)
        for _ in range(draws if bool(patched.any()) else 0):
            drawn = nothing.clone()
            for g, size in enumerate(patched.sum(1).tolist()):
                drawn[g, torch.randperm(shape[1], generator=generator)[:size]] = True
            null.append(hits(2, drawn))
            advance(1)
        history = tuple(
            (float(p), e, int(h.sum()), hits(0, h), hits(1, h)) for p, e, _, h in candidates
        )
    rendered = [r for d in (train, validation, test) for r in model.template.render_all(d.base)]
    models = [model, *([source] if source is not None else [])]
    return ComponentMask(
        name=train.name,
        origin="the source prompts" if source is None else source.label,
        groups=tuple(name for name, _ in train.groups),
        components=components.names,
        mask=mask.float(),
        patched=patched,
        loss=loss,
        penalty=float(penalty),
        epoch=epoch,
        history=history,
        sizes=(len(train), len(validation), len(test)),
        hits=(hits(0, patched), hits(1, patched), hits(2, patched)),
        unpatched=(hits(0, nothing), hits(1, nothing), hits(2, nothing)),
        everything=hits(2, ~nothing),
        null_hits=tuple(null),
        notes=few(test.topics),
        record=Record(
            models=tuple(m.name for m in models),
            fingerprints=tuple(m.fingerprint for m in models),
            template_hash=model.template.hash,
            prompts_hash=prompts_hash(rendered),
            seeds=(seed,),
            dtype=str(model.dtype).removeprefix("torch."),
            engine=model.engine.name,
            settings={
                "parts": list(parts), "penalties": list(penalties), "loss": loss, "lr": lr,
                "epochs": epochs, "batch_size": batch_size, "draws": draws,
            },
        ),
    )  # fmt: skip
