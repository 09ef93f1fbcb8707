"""What a patch is expected to do: base prompts, source prompts, and the next token after patching."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from analyses.patching.spans import Alignment, Spans, align
from probes.model import HookedModel
from probes.positions import Positions
from probes.prompts import Prompt, Rendered
from probes.splits import split

Place = str | Positions | Spans | Sequence[Sequence[int]]
"""A rule of `probes.positions`, named spans, or the token indices in each prompt (of the base and of
the source alike)."""


@dataclass(frozen=True)
class Desideratum:
    """Examples of one expectation: with the right components taken from the source run, the base
    run answers with the label. Made by `desideratum`."""

    name: str
    base: tuple[Prompt, ...]
    source: tuple[Prompt, ...]
    labels: tuple[int, ...]
    """Id of the expected next token of each patched base prompt."""
    others: tuple[int, ...]
    """Id of the token each label is compared with by the loss "logit difference"; may be empty."""
    topics: tuple[str, ...]
    groups: tuple[tuple[str, Alignment], ...]
    """Name of each position group, and which base tokens take values from which source tokens."""

    def __len__(self) -> int:
        return len(self.base)

    def only(self, rows: Sequence[int]) -> "Desideratum":
        """Some of the examples, in this order."""

        def taken(values: tuple) -> tuple:
            return tuple(values[i] for i in rows) if values else ()

        return replace(
            self,
            base=taken(self.base),
            source=taken(self.source),
            labels=taken(self.labels),
            others=taken(self.others),
            topics=taken(self.topics),
            groups=tuple(
                (
                    name,
                    Alignment(taken(a.target), taken(a.source), tuple(range(len(rows))), a.text),
                )
                for name, a in self.groups
            ),
        )

    def split(
        self, fractions: Mapping[str, float] | None = None, seed: int = 0
    ) -> tuple["Desideratum", "Desideratum", "Desideratum"]:
        """Training, validation and test examples, 1/2, 1/4 and 1/4 of the topics by default."""
        shares = fractions or {"train": 0.5, "validation": 0.25, "test": 0.25}
        if set(shares) != {"train", "validation", "test"}:
            raise ValueError(
                f"fractions name {sorted(shares)}: give 'train', 'validation' and 'test'"
            )
        rows = split(self.topics, fractions=shares, seed=seed)
        return (
            self.only(rows["train"].tolist()),
            self.only(rows["validation"].tolist()),
            self.only(rows["test"].tolist()),
        )


def desideratum(
    model: HookedModel,
    name: str,
    base: Sequence[Prompt],
    source: Sequence[Prompt],
    labels: Sequence[str | int],
    groups: Mapping[str, Place],
    *,
    others: Sequence[str | int] | None = None,
    topics: Sequence[str] | None = None,
    base_index: Sequence[int] | None = None,
    source_index: Sequence[int] | None = None,
) -> Desideratum:
    """Check examples and say where each position group lies in them.

    A label is a token id, or text that continues the patched base prompt by exactly one token:
    tokenised behind the prompt, so that a leading space is part of it where it is part of the text.
    `base_index` and `source_index` say what each prompt asks for (which box, which name); where a
    desideratum tells the two apart they have to differ, or the unpatched answer is the expected one.
    Position groups may not share tokens.
    """
    base, source = tuple(base), tuple(source)
    counts = {"source prompts": source, "labels": labels, "topics": topics, "others": others}
    for what, given in (
        counts | {"base indices": base_index, "source indices": source_index}
    ).items():
        if given is not None and len(given) != len(base):
            raise ValueError(
                f"desideratum {name!r} has {len(base)} base prompts and {len(given)} {what}: give "
                "one for each"
            )
    if (base_index is None) != (source_index is None):
        raise ValueError(f"desideratum {name!r} has one of base_index and source_index: give both")
    for i, (a, b) in enumerate(zip(base_index or (), source_index or (), strict=True)):
        if a == b:
            raise ValueError(
                f"base and source of example {i} of {name!r} have the same index {a}, so nothing "
                "needs to move to give the label: draw another source"
            )
    if not groups:
        raise ValueError(f"desideratum {name!r} has no position groups: name at least one")
    rendered, other = model.template.render_all(base), model.template.render_all(source)
    made = tuple((group, _placed(group, place, rendered, other)) for group, place in groups.items())
    for i in range(len(base)):
        seen: dict[int, str] = {}
        for group, alignment in made:
            for token in alignment.target[i]:
                if token in seen:
                    raise ValueError(
                        f"position groups {seen[token]!r} and {group!r} share token {token} of base "
                        f"prompt {i}: give each token to one group"
                    )
                seen[token] = group
    return Desideratum(
        name,
        base,
        source,
        tuple(label_id(model, r, label) for r, label in zip(rendered, labels, strict=True)),
        tuple(label_id(model, r, x) for r, x in zip(rendered, others or (), strict=bool(others))),
        tuple(topics) if topics is not None else tuple(str(i) for i in range(len(base))),
        made,
    )


def label_id(model: HookedModel, prompt: Rendered, label: str | int) -> int:
    """The one token by which a label continues a prompt."""
    if isinstance(label, int):
        if not 0 <= label < model.layout.vocab_size:
            raise ValueError(
                f"label id {label} lies outside the vocabulary of {model.layout.vocab_size} rows"
            )
        return label
    added = not model.template.chat
    ids = model.tokenizer(prompt.text + label, add_special_tokens=added, truncation=False)
    ids = list(ids["input_ids"])
    more = ids[len(prompt.ids) :] if tuple(ids[: len(prompt.ids)]) == prompt.ids else None
    if more is None or len(more) != 1:
        what = "changes the tokens before it" if more is None else f"is {len(more)} tokens"
        raise ValueError(
            f"the label {label!r} {what} behind {prompt.text[-40:]!r}: give a label that is one "
            "token there, with its leading space where the prompt ends without one"
        )
    return more[0]


def _placed(
    name: str, place: Place, base: Sequence[Rendered], source: Sequence[Rendered]
) -> Alignment:
    if isinstance(place, str | Positions | Spans):
        return align(base, source, place)
    if len(place) != len(base):
        raise ValueError(
            f"position group {name!r} has token indices for {len(place)} of {len(base)} prompts: "
            "give them for each"
        )
    for i, (tokens, a, b) in enumerate(zip(place, base, source, strict=True)):
        shorter = min(len(a.ids), len(b.ids))
        if not all(0 <= token < shorter for token in tokens) or len(set(tokens)) < len(tokens):
            raise ValueError(
                f"position group {name!r} names tokens {list(tokens)} of example {i}, whose "
                f"shorter prompt has {shorter}: give different indices from 0 to {shorter - 1}"
            )
    rows = tuple(tuple(sorted(tokens)) for tokens in place)
    return Alignment(rows, rows, tuple(range(len(rows))), name)
