"""Where the values of a patch come from: another prompt, another checkpoint, a mean, nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from analyses.checkpoints import _same_tokens
from analyses.patching.runs import Runs
from analyses.patching.spans import Alignment, Indices, Spans, align, align_ends
from probes.model import HookedModel
from probes.positions import Positions
from probes.prompts import Prompt, Rendered
from probes.sites import HEADED, Site


@dataclass(frozen=True)
class From:
    """The run of another model on the same tokens, of the same model on other prompts, or both.

    With `model` alone this is cross-model activation patching (CMAP; Prakash et al. 2024,
    section 6): the checkpoint reads exactly the target's token ids. With `prompts` alone, clean
    prompts into corrupt ones denoise and corrupt ones into clean ones noise.
    """

    model: HookedModel | None = None
    prompts: tuple[Prompt, ...] | None = None

    def __post_init__(self) -> None:
        if self.prompts is not None and not isinstance(self.prompts, tuple):
            object.__setattr__(self, "prompts", tuple(self.prompts))


@dataclass(frozen=True)
class Resampled:
    """The same run, each prompt with the values of another prompt drawn at random.

    The other prompt has as many tokens where there is such a one, else the nearest number, and
    is aligned at both ends (`spans.align_ends`). Prompts of one topic never serve each other.
    """

    of: From = From()
    topics: tuple[str, ...] | None = None
    seed: int = 0


@dataclass(frozen=True)
class Mean:
    """The mean activation over a prompt set: over all its tokens, or token by token.

    `by_position` needs prompts with as many tokens as the target's, and gives each token the mean
    at its own place (mean ablation as in circuit studies).
    """

    prompts: tuple[Prompt, ...]
    model: HookedModel | None = None
    by_position: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", tuple(self.prompts))
        if not self.prompts:
            raise ValueError("the mean of no prompts was asked: give at least one prompt")


@dataclass(frozen=True)
class Zero:
    """Zeros."""


Source = From | Resampled | Mean | Zero


class Values:
    """The values that go to the patched tokens of each target prompt."""

    def __init__(
        self,
        source: Source,
        target: HookedModel,
        rendered: Sequence[Rendered],
        positions: "str | Positions | Spans | Indices",
        rows: int,
    ) -> None:
        self.source, self.target, self.rows = source, target, rows
        self.rendered: Sequence[Rendered] = rendered
        self.model = target
        run = source.of if isinstance(source, Resampled) else source
        if not isinstance(run, Zero):
            self.model = run.model or target
            if run.model is not None:
                same_shape(target, run.model)
            if run.prompts is not None:
                self.rendered = self.model.template.render_all(run.prompts)
        self.alignment = self._align(rendered, positions)
        self._runs: Runs | None = None

    @property
    def has_run(self) -> bool:
        """Whether there is a source run whose logits are the other end of the gap."""
        return isinstance(self.source, From)

    @property
    def ids(self) -> list[tuple[int, ...]]:
        return [r.ids for r in self.rendered]

    def open(self, shared: int) -> None:
        """Read the source with so many common tokens run once; 0: whole passes."""
        self._runs = Runs(self.model, self.ids, shared=shared, rows=self.rows)

    @property
    def runs(self) -> Runs:
        assert self._runs is not None
        return self._runs

    def at(self, sites: Sequence[Site]) -> dict[Site, list[Tensor]]:
        """Values at parts without a head named, `[token, ...]` of each target prompt, on the CPU."""
        targets = self.alignment.target
        if isinstance(self.source, Zero):
            return {
                site: [torch.zeros(len(t), *self._shape(site)) for t in targets] for site in sites
            }
        found = self.runs.read(sites)
        pairs = list(zip(self.alignment.partner, self.alignment.source, strict=True))
        if not isinstance(self.source, Mean):
            return {
                site: [rows[j][list(tokens)] for j, tokens in pairs] for site, rows in found.items()
            }
        made = {}
        for site, rows in found.items():
            if self.source.by_position:
                mean = torch.stack(rows).double().mean(0).to(rows[0].dtype)
                made[site] = [mean[list(t)] for t in targets]
            else:
                mean = torch.cat(rows).double().mean(0).to(rows[0].dtype)
                made[site] = [mean.expand(len(t), *mean.shape) for t in targets]
        return made

    def _shape(self, site: Site) -> tuple[int, ...]:
        width = self.target.layout.width(site)
        if site.part not in HEADED:
            return (width,)
        return self.target.layout.blocks[site.layer].heads[site.part], width

    def _align(
        self, target: Sequence[Rendered], positions: "str | Positions | Spans | Indices"
    ) -> Alignment:
        source = self.source
        if isinstance(source, From):
            return align(target, self.rendered, positions)
        if isinstance(source, Resampled):
            if isinstance(positions, Spans):
                raise ValueError(
                    "values of a random other prompt cannot follow named spans: use a position "
                    "rule such as 'all' or 'last'"
                )
            partner = partners([len(r.ids) for r in target], self.ids, source)
            return align_ends(target, self.rendered, partner, positions)
        if isinstance(source, Mean) and source.by_position:
            wanted = {len(r.ids) for r in (*target, *self.rendered)}
            if len(wanted) > 1:
                raise ValueError(
                    f"a mean by position needs prompts of one length, these have {min(wanted)} to "
                    f"{max(wanted)} tokens: use by_position=False, or prompts of one form"
                )
        return align(target, target, positions)


def partners(
    lengths: Sequence[int], source: Sequence[Sequence[int]], rule: Resampled
) -> tuple[int, ...]:
    """For each target prompt another source prompt, of its length where there is one."""
    topics = rule.topics or tuple(str(i) for i in range(len(lengths)))
    if len(topics) != len(lengths) or len(source) != len(lengths):
        raise ValueError(
            f"{len(topics)} topics and {len(source)} source prompts for {len(lengths)} prompts: "
            "give one of each for every prompt"
        )
    if len(set(topics)) < 2:
        raise ValueError("all prompts have one topic: values of another need at least 2 topics")
    generator = torch.Generator().manual_seed(rule.seed)
    found = []
    for i, length in enumerate(lengths):
        others = [j for j, topic in enumerate(topics) if topic != topics[i]]
        nearest = min(abs(len(source[j]) - length) for j in others)
        fitting = [j for j in others if abs(len(source[j]) - length) == nearest]
        found.append(fitting[int(torch.randint(len(fitting), (), generator=generator))])
    return tuple(found)


def same_shape(target: HookedModel, source: HookedModel) -> None:
    """Refuse to patch between models that are not checkpoints of one model."""
    if source is target:
        return
    mine, other = (
        (
            model.n_layers,
            model.d_model,
            tuple(tuple(sorted(b.heads.items())) for b in model.layout.blocks),
            tuple(tuple(sorted(b.widths.items())) for b in model.layout.blocks),
        )
        for model in (target, source)
    )
    if mine != other:
        what = (
            f"{other[0]} layers of width {other[1]}, {target.name} {mine[0]} of width {mine[1]}"
            if mine[:2] != other[:2]
            else f"other heads or head widths than {target.name}"
        )
        raise ValueError(
            f"{source.name} has {what}: activations can be patched between checkpoints of one "
            "model only"
        )
    if target.tokenizer is not None and source.tokenizer is not None:
        _same_tokens(source, target)
