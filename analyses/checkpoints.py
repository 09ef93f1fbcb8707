"""Checkpoints of one model side by side: one template and one vocabulary for all of them."""

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from probes import names
from probes.model import HookedModel

ROLES = ("base", "aligned", "drifted")


@dataclass(frozen=True)
class Checkpoint:
    """One model of a comparison."""

    role: str
    """base, aligned or drifted; there may be several drifted ones."""
    model: HookedModel

    @property
    def label(self) -> str:
        return self.model.label


@dataclass(frozen=True)
class Checkpoints:
    """An ordered lineage: base, aligned, then any number of drifted models.

    All are prompted with the aligned model's chat template, because a true base model has none
    and because two templates would be compared instead of two models.
    """

    items: tuple[Checkpoint, ...]
    vocab_size: int
    """Token ids all checkpoints share; ids above are left out of every comparison."""
    notes: tuple[str, ...]

    @property
    def base(self) -> HookedModel:
        return self.items[0].model

    @property
    def aligned(self) -> HookedModel:
        return self.items[1].model

    @property
    def drifted(self) -> tuple[Checkpoint, ...]:
        return self.items[2:]

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(item.label for item in self.items)


def load(
    base: str,
    aligned: str,
    drifted: Sequence[str] = (),
    *,
    engine: str = "transformers",
    **options: Any,
) -> Checkpoints:
    """Load checkpoints by name and make them comparable (see `compare`)."""
    named = [("base", base), ("aligned", aligned), *(("drifted", name) for name in drifted)]
    for _, name in named:
        names.parse(name)  # a wrong last name is said before the first model is loaded
    return compare(
        [Checkpoint(role, HookedModel.load(name, engine, **options)) for role, name in named]
    )


def compare(items: Sequence[Checkpoint]) -> Checkpoints:
    """Give every checkpoint the aligned one's template and tokenizer, or say why that is wrong.

    The models given stay as they are: those of the answer share their weights, and carry labels
    that no two of them have in common.
    """
    roles = [item.role for item in items]
    if roles[:2] != ["base", "aligned"] or set(roles[2:]) - {"drifted"}:
        raise ValueError(f"the roles are {roles}: expected base, aligned, then drifted ones")
    aligned = items[1].model
    template = aligned.template
    labels = unique_labels([item.label for item in items], [item.model.name for item in items])
    notes: list[str] = []
    shared: list[Checkpoint] = []
    for item, label in zip(items, labels, strict=True):
        own = getattr(item.model.tokenizer, "chat_template", None)
        if item.model is not aligned and template.chat and own != template.source:
            what = "has no chat template" if own is None else "has another chat template"
            notes.append(f"{label} {what}; it was prompted with that of {labels[1]}.")
        shared.append(Checkpoint(item.role, prompted_as(item.model, aligned, label)))
    sizes = [item.model.layout.vocab_size for item in items]
    fits(aligned, min(sizes))
    if len(set(sizes)) > 1:
        notes.append(
            f"The vocabularies have {', '.join(map(str, sizes))} rows; ids from {min(sizes)} on "
            f"({max(sizes) - min(sizes)} rows) were left out."
        )
    return Checkpoints(tuple(shared), min(sizes), tuple(notes))


def prompted_as(model: HookedModel, aligned: HookedModel, label: str | None = None) -> HookedModel:
    """The same weights under another label, prompted with the template and tokenizer of `aligned`;
    an error where shapes or token ids differ."""
    shared = copy.copy(model)
    if model is not aligned:
        _same_shape(model, aligned)
        _same_tokens(model, aligned)
    shared.label = label or model.label
    shared.tokenizer = aligned.tokenizer
    shared.template = aligned.template  # pyright: ignore[reportAttributeAccessIssue]
    return shared


def unique_labels(labels: Sequence[str], names: Sequence[str]) -> list[str]:
    """Labels; those that several checkpoints have become the full names, then are numbered."""
    for found in (list(labels), list(names)):
        if len(set(found)) == len(found):
            return found
    often, seen = Counter(labels), Counter[str]()
    made = []
    for label in labels:
        seen[label] += 1
        made.append(label + (f" ({seen[label]})" if often[label] > 1 else ""))
    return made


def fits(aligned: HookedModel, vocab_size: int) -> None:
    """The template's own tokens must exist in every checkpoint, or no prompt can be read."""
    ids = aligned.template.render("a").ids
    if max(ids) >= vocab_size:
        token = aligned.tokenizer.convert_ids_to_tokens(max(ids))
        raise ValueError(
            f"the prompts of {aligned.name} hold {token!r}, id {max(ids)}, and the smallest "
            f"vocabulary of the lineage has {vocab_size} rows: load the checkpoints with a "
            "template made of common tokens, or template='none'"
        )


def _same_shape(model: HookedModel, aligned: HookedModel) -> None:
    mine, other = (model.n_layers, model.d_model), (aligned.n_layers, aligned.d_model)
    if mine != other:
        raise ValueError(
            f"{model.name} has {mine[0]} layers of width {mine[1]}, {aligned.name} has {other[0]} "
            f"of width {other[1]}: a lineage is made of checkpoints of one model"
        )


def _same_tokens(model: HookedModel, aligned: HookedModel) -> None:
    if model.tokenizer is None:
        return
    mine, other = (
        {id_: text for text, id_ in m.tokenizer.get_vocab().items()} for m in (model, aligned)
    )
    wrong = [i for i in mine.keys() & other.keys() if mine[i] != other[i]]
    if wrong:
        first = min(wrong)
        raise ValueError(
            f"the tokenizers of {model.name} and {aligned.name} differ: id {first} means "
            f"{mine[first]!r} in one and {other[first]!r} in the other ({len(wrong)} such ids); "
            "their distributions cannot be compared token by token"
        )
