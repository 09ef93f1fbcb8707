"""What a circuit does: prompts with one right next token, and a counterfactual of each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from analyses.patching.metrics import Metric
from probes.model import HookedModel
from probes.prompts import Prompt, Rendered


@dataclass(frozen=True)
class Task:
    """Prompts of one form, each beside a counterfactual that differs in one named respect.

    A prompt and its counterfactual have equally many tokens, so that they correspond one to one.
    """

    name: str
    prompts: tuple[Prompt, ...]
    counterfactuals: tuple[Prompt, ...]
    """The i-th belongs to the i-th prompt."""
    changed: str
    """What a counterfactual changes, in words."""
    answers: tuple[int, ...]
    """Id of the right next token of each prompt."""
    others: tuple[int, ...]
    """Id of the token that the answer is compared with, the counterfactual's answer where it has
    one."""
    topics: tuple[str, ...]
    """Groups of the intervals: prompts of one topic are not independent."""
    metric: Metric
    """One number a prompt from the last position's logits, larger where the answer is favoured."""
    chat: bool
    """Whether prompts are rendered by a chat template or read as plain text."""
    places: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    """Token indices of named places in each rendered prompt; the same in its counterfactual."""

    def __post_init__(self) -> None:
        n = len(self.prompts)
        lengths = {
            "counterfactuals": len(self.counterfactuals),
            "answers": len(self.answers),
            "others": len(self.others),
            "topics": len(self.topics),
        } | {f"places of {name!r}": len(rows) for name, rows in self.places.items()}
        for what, found in lengths.items():
            if found != n:
                raise ValueError(
                    f"task {self.name!r} has {n} prompts and {found} {what}: give one for each"
                )
        if not n:
            raise ValueError(f"task {self.name!r} has no prompts: give at least one")

    def __len__(self) -> int:
        return len(self.prompts)

    def rendered(self, model: HookedModel) -> tuple[list[Rendered], list[Rendered]]:
        """Prompts and counterfactuals as the model reads them.

        A model with the wrong kind of template, and pairs of unequal length, are errors.
        """
        if model.template.chat != self.chat:
            wanted = "a chat template" if self.chat else "template='none'"
            raise ValueError(
                f"task {self.name!r} is {'a chat' if self.chat else 'plain text'} and {model.name} "
                f"was loaded {'without' if self.chat else 'with'} a chat template: load it with "
                f"{wanted}"
            )
        clean = model.template.render_all(self.prompts)
        changed = model.template.render_all(self.counterfactuals)
        for i, (a, b) in enumerate(zip(clean, changed, strict=True)):
            if len(a.ids) != len(b.ids):
                raise ValueError(
                    f"prompt {i} of task {self.name!r} has {len(a.ids)} tokens and its "
                    f"counterfactual {len(b.ids)} under this tokenizer: generate the task for it"
                )
        return clean, changed

    def only(self, rows: Sequence[int]) -> "Task":
        """The task on some of its prompts, in this order; a metric that holds ids follows."""
        from dataclasses import fields, is_dataclass, replace

        def taken(values: tuple) -> tuple:
            return tuple(values[i] for i in rows)

        metric = self.metric
        if is_dataclass(metric) and not isinstance(metric, type):
            names = {f.name for f in fields(metric)} & {"answers", "others"}
            metric = replace(metric, **{name: taken(getattr(metric, name)) for name in names})
        return replace(
            self,
            prompts=taken(self.prompts),
            counterfactuals=taken(self.counterfactuals),
            answers=taken(self.answers),
            others=taken(self.others),
            topics=taken(self.topics),
            metric=metric,
            places={name: taken(found) for name, found in self.places.items()},
        )
