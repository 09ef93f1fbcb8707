"""Follow a direction through a text: its projection at every layer and token, against a band.

The band is what benign prompts show at the same layer, so that a value can be called high only
when it leaves what is usual there.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from probes import figures
from probes.capturing import stream
from probes.engines import Edit, Where
from probes.model import HookedModel
from probes.prompts import Prompt
from probes.results import Result, check_finite
from probes.sites import Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Scan(Result):
    """Projections of one text on one unit direction, by layer and token."""

    tokens: tuple[str, ...]
    n_prompt: int
    """Tokens before the answer."""
    layers: tuple[int, ...]
    projection: Float[Tensor, "layer token"]
    """Inner product of the residual stream with the unit direction, in activation units."""
    low: Float[Tensor, " layer"]
    """5th percentile over all content tokens of the benign prompts."""
    high: Float[Tensor, " layer"]
    """95th percentile."""
    n_benign: int
    """Tokens the band was made from."""

    @property
    def outside(self) -> Bool[Tensor, "layer token"]:
        """Where the projection leaves the benign band."""
        p = self.projection
        return (p < self.low[:, None]) | (p > self.high[:, None])

    def frame(self) -> "pd.DataFrame":
        """One row per layer and token."""
        import pandas as pd

        n = len(self.tokens)
        return pd.DataFrame(
            {
                "layer": [layer for layer in self.layers for _ in range(n)],
                "position": list(range(n)) * len(self.layers),
                "token": list(self.tokens) * len(self.layers),
                "generated": [i >= self.n_prompt for i in range(n)] * len(self.layers),
                "projection": self.projection.flatten().tolist(),
                "outside_band": self.outside.flatten().tolist(),
            }
        )

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Layers against tokens, in units of the benign band's half width; dots leave the band."""
        ax = figures.axes(ax, max(5.0, 0.2 * len(self.tokens)), 4.2)
        middle, half = (self.high + self.low) / 2, (self.high - self.low) / 2
        value = (self.projection - middle[:, None]) / half[:, None].clamp(min=1e-9)
        with figures.theme():
            image = ax.imshow(
                value.numpy(), aspect="auto", cmap="RdBu_r", vmin=-3, vmax=3, origin="lower"
            )
            rows, columns = self.outside.nonzero().T
            ax.scatter(columns, rows, s=2, color="black", label="outside the benign 5 to 95 % band")
            ax.set_xticks(range(len(self.tokens)), [_shown(t) for t in self.tokens], rotation=90)
            step = max(1, len(self.layers) // 8)
            ax.set_yticks(range(0, len(self.layers), step), [str(n) for n in self.layers[::step]])
            if self.n_prompt < len(self.tokens):
                ax.axvline(self.n_prompt - 0.5, color="black", lw=1)
            ax.grid(False)
            ax.tick_params(axis="x", labelsize=6)
            ax.set(xlabel="token (generated ones right of the line)", ylabel="layer")
            figure = ax.get_figure()
            assert figure is not None
            bar = figure.colorbar(image, ax=ax)
            bar.set_label("projection, band half widths from its middle")
            ax.set_title("Projection on the direction")
            ax.legend(loc="upper left", bbox_to_anchor=(0, -0.35))
        return ax

    def __str__(self) -> str:
        share = self.outside.float().mean()
        return f"scan of {len(self.tokens)} tokens: {share:.0%} of the cells leave the benign band"


def scan(
    model: HookedModel,
    unit: Float[Tensor, " d_model"],
    prompt: Prompt,
    benign: Sequence[Prompt],
    *,
    layers: Sequence[int] | None = None,
    max_new_tokens: int = 0,
) -> Scan:
    """Project a prompt, and optionally the model's greedy answer to it, on a direction.

    `unit` is normalised; the band comes from the content tokens of `benign` prompts.
    """
    unit = checked(unit, model.d_model)
    sites = model.sites(
        "all.resid_post" if layers is None else [f"{layer}.resid_post" for layer in layers]
    )
    answer = model.generate([prompt], max_new_tokens)[0] if max_new_tokens else None
    rendered = model.template.render(prompt, answer)
    given = None if answer is None else [answer]
    own = next(iter(stream(model, [prompt], sites, "all", answers=given))).values
    band: list[list[Tensor]] = [[] for _ in sites]
    for done in stream(model, benign, sites, "content"):
        for i, site in enumerate(sites):
            band[i].append(done.values[site].float() @ unit)
    usual = torch.stack([torch.cat(parts) for parts in band])
    ends = usual.double().quantile(torch.tensor([0.05, 0.95], dtype=torch.float64), dim=1).float()
    return Scan(
        tokens=tuple(model.tokenizer.decode([i]) for i in rendered.ids),
        n_prompt=rendered.n_prompt,
        layers=tuple(site.layer for site in sites),
        projection=torch.stack([own[site].float() @ unit for site in sites]),
        low=ends[0],
        high=ends[1],
        n_benign=usual.shape[1],
    )


@contextmanager
def monitor(
    model: HookedModel,
    unit: Float[Tensor, " d_model"],
    layer: int,
    heard: Callable[[int, Float[Tensor, " batch"]], None],
) -> Iterator[None]:
    """Watch generation as it happens: `heard(step, projections)` for every pass of the model.

    Step 0 gives each prompt's last token, step i the i-th generated token. Nothing is changed.
    """
    direction = checked(unit, model.d_model)
    site = Site(layer, "resid_post").resolve(model.n_layers)

    def listen(h: Tensor, where: Where) -> Tensor:
        place = torch.arange(where.mask.shape[1], device=h.device)
        last = (where.mask * (place + 1)).argmax(1)  # pads may stand on either side
        rows = h[torch.arange(len(h), device=h.device), last].float()
        heard(where.step, (rows @ direction.to(rows.device)).cpu())
        return h

    with model.edit([Edit(site, listen)]):
        yield


def checked(unit: Float[Tensor, "..."], d_model: int) -> Float[Tensor, " d_model"]:
    """The direction with norm 1; another width, NaN or zero is refused."""
    if unit.shape != (d_model,):
        raise ValueError(
            f"the direction has shape {tuple(unit.shape)}, expected ({d_model},): it was made for "
            "another model"
        )
    check_finite(unit, "the direction")
    norm = unit.float().norm()
    if norm == 0:
        raise ValueError("the direction is zero: it points nowhere")
    return unit.float() / norm


def _shown(token: str) -> str:
    return token.replace("\n", "⏎").replace("$", r"\$").strip() or "␣"
