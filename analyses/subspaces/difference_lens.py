"""What fine-tuning left on unrelated text: the mean difference of two checkpoints' activations.

On the first few tokens of text that has nothing to do with the training, the mean difference of
activations still tells of it: read through the final norm and the unembedding it names tokens, and
added to the stream it writes about them (Minder et al. 2025, arXiv 2510.13900, activation
difference lens). A difference of two equal runs is there as well, so it is read beside random
directions and beside the differences of a training repeated with another seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.figures import broken, legend_below
from analyses.subspaces.activations_figure import whole_layers
from analyses.subspaces.difference_reading import (
    REFUSAL_WORDS,
    Reader,
    beginnings,
    half_cosine,
    relative_norm,
    without_template,
)
from probes import figures
from probes.capturing import capture
from probes.model import HookedModel
from probes.prompts import prompts_hash
from probes.results import Record, Result
from probes.scores import permutation_p
from probes.splits import FEW_GROUPS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

Words = tuple[tuple[tuple[str, ...], ...], ...]
"""Tokens by layer and position, the strongest first."""


@dataclass(frozen=True)
class DifferenceLens(Result):
    """Mean difference `model - reference` on the first tokens of texts, by layer and position."""

    model: str
    reference: str
    layers: tuple[int, ...]
    texts: int
    difference: Float[Tensor, "layer position d_model"]
    """Mean over texts, in the unit of the activations; position 0 is the first token."""
    relative: Float[Tensor, "layer position 3"]
    """Norm of the mean difference over the mean norm of the reference's activations there, with
    95 % BCa limits over texts; exactly 0 where nothing differs."""
    halves: Float[Tensor, "layer position"]
    """Mean cosine of the mean differences of two random halves of the texts, -1 to 1; 0 where
    there is no difference."""
    halves_null: Float[Tensor, "layer position"]
    """95th percentile of that cosine for noise alone: what each text's difference has beside the
    mean, with a random sign."""
    promoted: Words
    """Tokens of the largest logits of the difference; none where it is 0."""
    suppressed: Words
    words: tuple[str, ...]
    share: Float[Tensor, "layer position"]
    """Share of the promoted tokens that are in `words`, 0 to 1."""
    null: Float[Tensor, "draw layer position"]
    """The same of random directions of equal norm: half of them isotropic, half differences
    between random halves of the reference's texts (isotropic where all texts are one so far)."""
    apart: Float[Tensor, "half layer position d_model"]
    """Those differences between means of random halves, as they are; 0 where all texts are one."""
    notes: tuple[str, ...] = ()

    @property
    def top(self) -> int:
        """Tokens read."""
        return max((len(tokens) for row in self.promoted for tokens in row), default=0)

    @property
    def identical(self) -> bool:
        """Whether the models differ nowhere, bit for bit."""
        return not bool(self.difference.any())

    def p(self, layer: int | None = None) -> float:
        """Exact one-sided p of the mean share over positions (of one layer, or of all layers)
        among those of the random directions; 1 for identical models."""
        rows = slice(None) if layer is None else self.layers.index(layer)
        return permutation_p(
            float(self.share[rows].double().mean()), self.null[:, rows].double().flatten(1).mean(1)
        )

    def frame(self) -> "pd.DataFrame":
        """One row per layer and position, with the strongest tokens."""
        import pandas as pd

        rows = []
        for i, layer in enumerate(self.layers):
            for place in range(self.difference.shape[1]):
                relative, low, high = self.relative[i, place].tolist()
                rows.append(
                    {
                        "model": self.model,
                        "reference": self.reference,
                        "layer": layer,
                        "position": place,
                        "norm": float(self.difference[i, place].norm()),
                        "relative": relative,
                        "relative_low": low,
                        "relative_high": high,
                        "halves": float(self.halves[i, place]),
                        "halves_null": float(self.halves_null[i, place]),
                        "share": float(self.share[i, place]),
                        "share_null": float(self.null[:, i, place].double().quantile(0.95)),
                        "p_layer": self.p(layer),
                        "promoted": " ".join(self.promoted[i][place][:10]),
                        "suppressed": " ".join(self.suppressed[i][place][:10]),
                    }
                )
        return pd.DataFrame(rows)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Relative norm by layer, one curve a position, with 95 % intervals over texts."""
        ax = figures.axes(ax, 5.0, 3.9)  # room for a legend below
        x = list(self.layers)
        with figures.theme():
            for place in range(self.difference.shape[1]):
                value, low, high = (100 * self.relative[:, place]).unbind(-1)
                look = figures.style(place)
                ax.fill_between(x, low.numpy(), high.numpy(), alpha=0.12, lw=0, color=look["color"])
                ax.plot(x, value.numpy(), label=str(place), **look)
            ax.set(
                xlabel="layer (0 is the first block)",
                ylabel="norm of the mean difference\n(% of the stream's mean norm)",
                title=broken(f"{self.model} minus {self.reference}, {self.texts} unrelated texts"),
            )
            whole_layers(ax)
            legend_below(ax, "token position, 95 % interval over texts")
        return ax

    def plot_share(self, ax: "Axes | None" = None) -> "Axes":
        """Share of promoted tokens in the word list by layer, with that of random directions."""
        ax = figures.axes(ax, 5.0, 3.9)  # room for a legend below
        x = list(self.layers)
        with figures.theme():
            mean = self.share.double().mean(1)
            ax.plot(x, mean.numpy(), label=f"{self.model} - {self.reference}", **figures.style(0))
            null = self.null.double().mean(2)
            dark = figures.PALETTE[6]
            ax.plot(
                x, null.quantile(0.95, dim=0).numpy(), ls=":", color=dark,
                label=f"{len(null)} random directions, 95 %",
            )  # fmt: skip
            ax.plot(x, null.mean(0).numpy(), ls="--", lw=1, color=dark, label="their mean")
            highest = max(0.1, 1.15 * float(torch.maximum(mean, null.quantile(0.95, dim=0)).max()))
            ax.set(
                ylim=(-0.02 * highest, highest),
                xlabel="layer (0 is the first block)",
                ylabel=f"share of the top {self.top} tokens in the list",
                title=broken("What the difference says, mean over positions"),
            )
            whole_layers(ax)
            legend_below(ax)
        return ax

    def __str__(self) -> str:
        name = f"difference lens {self.model} - {self.reference}"
        if self.identical:
            return f"{name}: the models are identical, every difference is exactly zero"
        at = int(self.relative[..., 0].mean(1).argmax())
        said = self.promoted[at][min(1, self.difference.shape[1] - 1)][:5]
        return (
            f"{name}: {100 * float(self.relative[at, :, 0].mean()):.1f} % of the stream at layer "
            f"{self.layers[at]}, promotes {' '.join(said)}; {float(self.share.mean()):.1%} of the "
            f"promoted tokens in the list, random {float(self.null.mean()):.1%}, p = {self.p():.3f}"
        )


def measure_difference(
    model: HookedModel,
    reference: HookedModel,
    texts: Sequence[str],
    *,
    layers: Sequence[int] | None = None,
    positions: int = 5,
    words: Sequence[str] = REFUSAL_WORDS,
    top: int = 20,
    draws: int = 20,
    resamples: int = 500,
    seed: int = 0,
) -> DifferenceLens:
    """Read both models on the first tokens of plain texts, without a chat template.

    The difference goes through the final norm and unembedding of `model`. Every text needs
    `positions` tokens. With fewer than 20 draws of random directions no p can fall below 0.05.
    """
    if len(texts) < 4 or draws < 20:
        raise ValueError(
            f"{len(texts)} texts and {draws} random directions were given: at least 4 texts can be "
            "halved, and a null needs at least 20 directions"
        )
    if model.n_layers != reference.n_layers or model.d_model != reference.d_model:
        raise ValueError(
            f"{model.name} has {model.n_layers} layers of width {model.d_model}, {reference.name} "
            f"{reference.n_layers} of {reference.d_model}: a difference needs checkpoints of one "
            "model"
        )
    if not words or not 1 <= top <= model.layout.vocab_size:
        raise ValueError(f"{len(words)} words and {top} tokens were asked: give 1 or more of both")
    where = tuple(range(model.n_layers) if layers is None else layers)
    sites = [f"{layer}.resid_post" for layer in where]
    plain = [without_template(model), without_template(reference, model)]
    rendered = plain[0].template.render_all(list(texts))
    short = [r for r in rendered if len(r.ids) < positions]
    if short or positions < 1:
        raise ValueError(
            f"{len(short)} texts have fewer than {positions} tokens, the first {short[0].text!r}"
            if short else f"{positions} positions were asked: give 1 or more"
        )  # fmt: skip
    # a state is that of all tokens so far
    alike = [len({r.ids[: place + 1] for r in rendered}) == 1 for place in range(positions)]
    read_texts = beginnings(plain[0].template, texts, positions)
    acts = [capture(m, read_texts, sites, f"tokens:0:{positions}", progress=False) for m in plain]
    generator = torch.Generator().manual_seed(seed)
    half = torch.rand(max(20, draws), len(texts), generator=generator).argsort(1) < len(texts) // 2
    drawn = torch.randint(len(texts), (resamples, len(texts)), generator=generator)
    boot = torch.zeros(resamples, len(texts), dtype=torch.float64)
    boot.scatter_add_(1, drawn, torch.ones_like(boot))
    signs = torch.randint(2, (200, len(texts)), generator=generator).double() * 2 - 1
    read = Reader(model, words, top)
    shape = len(where), positions, model.d_model
    difference = torch.zeros(shape)
    relative = torch.zeros(*shape[:2], 3)
    halves, halves_null, share = (torch.zeros(shape[:2]) for _ in range(3))
    null, apart = torch.zeros(draws, *shape[:2]), torch.zeros(draws // 2, *shape)
    promoted: list[list[tuple[str, ...]]] = [[] for _ in where]
    suppressed: list[list[tuple[str, ...]]] = [[] for _ in where]
    for i, site in enumerate(sites):
        a, b = (found[site].reshape(len(texts), positions, -1).double() for found in acts)
        for place in range(positions):
            x, h = a[:, place] - b[:, place], b[:, place]
            mean = x.mean(0)
            difference[i, place] = mean
            random = torch.randn(draws, len(mean), generator=generator, dtype=torch.float64)
            if not alike[place]:
                found = torch.stack([h[c].mean(0) - h[~c].mean(0) for c in half[: draws // 2]])
                apart[:, i, place] = found
                random[draws - len(found) :] = found
            if not bool(x.any()):
                promoted[i].append(())
                suppressed[i].append(())
                continue
            relative[i, place] = relative_norm(x, h, boot)
            gram = x @ x.T
            halves[i, place] = half_cosine(gram, half[:20], torch.ones(1, len(x)).double()).mean()
            noise = x - mean
            halves_null[i, place] = half_cosine(noise @ noise.T, half[:1], signs).quantile(0.95)
            strong, weak, hit = read(mean[None])
            promoted[i].append(strong[0])
            suppressed[i].append(weak[0])
            share[i, place] = hit[0]
            random = random / random.norm(dim=1, keepdim=True) * mean.norm()
            null[:, i, place] = read(random)[2]
    return DifferenceLens(
        model=model.label,
        reference=reference.label,
        layers=where,
        texts=len(texts),
        difference=difference,
        relative=relative,
        halves=halves,
        halves_null=halves_null,
        promoted=tuple(map(tuple, promoted)),
        suppressed=tuple(map(tuple, suppressed)),
        words=tuple(words),
        share=share,
        null=null,
        apart=apart,
        notes=_notes(len(texts), sum(alike)),
        record=Record(
            models=(model.name, reference.name),
            fingerprints=(model.fingerprint, reference.fingerprint),
            template_hash=plain[0].template.hash,
            prompts_hash=prompts_hash(plain[0].template.render_all(read_texts)),
            seeds=(seed,),
            dtype=str(model.dtype).removeprefix("torch."),
            engine=model.engine.name,
            settings={"positions": positions, "few": len(texts) < FEW_GROUPS},
        ),
    )


def _notes(texts: int, alike: int) -> tuple[str, ...]:
    notes = []
    if alike:
        where = "position 0 is" if alike == 1 else f"positions 0 to {alike - 1} are"
        notes.append(
            f"{where} one token in all texts: the null there is of isotropic directions alone, and "
            "intervals and halves over texts say nothing there."
        )
    if texts < FEW_GROUPS:
        notes.append(f"Intervals rest on {texts} texts; {FEW_GROUPS} are advised.")
    return tuple(notes)
