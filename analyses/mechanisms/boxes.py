"""Entity tracking: which object is in the box that is asked for.

"The apple is in Box F, the computer is in Box Q. Box F contains the" goes on with " apple". The
answer stands once in the prompt and only the label says which object it is (Prakash et al. 2024,
https://arxiv.org/abs/2402.14811, after Kim and Schuster 2023; objects, labels and code are ours).
"""

from collections.abc import Sequence
from typing import NamedTuple

from analyses.mechanisms.task import Task
from analyses.mechanisms.words import (
    dealt,
    drawn,
    enough,
    generator,
    ids_of,
    known,
    places_of,
    plain_text,
    single_tokens,
)
from analyses.patching.metrics import LogitDifference
from probes.model import HookedModel

_OBJECTS = (
    "apple book camera clock coin cup doll drum egg fan flag flower fork game glass glove guitar "
    "hammer hat helmet jacket jar key knife lamp letter magazine map medal milk mirror needle note "
    "painting pan paper pen pencil phone photo pillow pipe plane plant plate pot radio ring rock "
    "rope rose sheet shell shirt shoe soap sock spoon stamp stone sword tape tea ticket tie tool "
    "toy train umbrella vase watch wheel wine wire brick bread bottle bell belt basket banana "
    "blanket bowl brush cake candle card carrot chain cheese coat computer cookie crown dish"
)
OBJECTS = tuple(_OBJECTS.split())
LABELS = tuple("BCDEFGHJKLMNOPQRSTUVWXYZ")  # without A and I, which are words
BOXES = 3
"""Boxes in a prompt."""
COUNTERFACTUALS = {
    "query": "the label asked for is another one of the prompt",
    "example": "another example, with other objects and labels",
}


class Example(NamedTuple):
    """Objects and labels in their order, and which of them is asked for."""

    objects: tuple[str, ...]
    labels: tuple[str, ...]
    asked: int

    @property
    def text(self) -> str:
        stated = [f"the {o} is in Box {b}" for o, b in zip(self.objects, self.labels, strict=True)]
        said = ", ".join(stated)
        return f"{said[0].upper()}{said[1:]}. Box {self.labels[self.asked]} contains the"


def boxes(
    model: HookedModel,
    part: str = "test",
    n: int = 60,
    *,
    boxes: int = BOXES,
    counterfactual: str = "query",
    seed: int = 0,
) -> Task:
    """`n` prompts with `boxes` boxes each; parts share no object.

    Objects and labels are one token each, no two alike, and the label asked for stands exactly
    once before, checked in every prompt. `counterfactual` is one of `COUNTERFACTUALS`. The metric
    is logit(object asked for) - logit(the counterfactual's object). Chance is 1/2, and one over the
    number of boxes for naming the right object of the prompt.

    SmolLM2-135M, base and aligned, is at chance with 2 to 7 boxes, in this form and in six others
    that were tried: a model has to be larger to keep boxes apart. Ask `tasks.accuracy` first.
    """
    name = "boxes"
    plain_text(model, name)
    if counterfactual not in COUNTERFACTUALS:
        raise ValueError(
            f"counterfactual {counterfactual!r}: choose one of {', '.join(COUNTERFACTUALS)}"
        )
    if boxes < 2:
        raise ValueError(f"{boxes} boxes leave nothing to tell apart: ask for 2 or more")
    times = 2 if counterfactual == "example" else 1
    objects = single_tokens(model, dealt(OBJECTS, part))
    labels = single_tokens(model, LABELS, "Box")
    # a word that is also an object's or a label's would count twice
    clash = set(objects.values()) & set(labels.values())
    objects = {word: token for word, token in objects.items() if token not in clash}
    enough(list(objects), boxes * times, f"objects of the part {part}", name, model)
    enough(list(labels), boxes * times, "box labels", name, model)
    draw = generator(part, seed, name, boxes, counterfactual)

    def one() -> tuple[Example, Example] | None:
        chosen = draw.sample(sorted(objects), boxes * times)
        tags = draw.sample(sorted(labels), boxes * times)
        asked, other = draw.sample(range(boxes), 2)
        clean = Example(tuple(chosen[:boxes]), tuple(tags[:boxes]), asked)
        if counterfactual == "query":
            changed = clean._replace(asked=other)
        else:
            changed = Example(tuple(chosen[boxes:]), tuple(tags[boxes:]), other)
        good = all(_once(model, e, objects, labels) for e in (clean, changed))
        return (clean, changed) if good else None

    pairs = list(drawn(one, n, name))
    answers = tuple(objects[a.objects[a.asked]] for a, _ in pairs)
    others = tuple(objects[b.objects[b.asked]] for _, b in pairs)
    return Task(
        name=name,
        prompts=tuple(a.text for a, _ in pairs),
        counterfactuals=tuple(b.text for _, b in pairs),
        changed=COUNTERFACTUALS[counterfactual],
        answers=answers,
        others=others,
        topics=tuple(f"{name}-{part}-{i:04d}" for i in range(n)),
        metric=LogitDifference(answers, others),
        chat=False,
        places=_places(model, [a for a, _ in pairs], objects, labels),
    )


def _once(model: HookedModel, e: Example, objects: dict[str, int], labels: dict[str, int]) -> bool:
    """Whether every object and label stands once, and the label asked for once more."""
    ids = ids_of(model, e.text)
    if not known(model, e.text):
        return False
    return all(len(places_of(ids, objects[o])) == 1 for o in e.objects) and all(
        len(places_of(ids, labels[b])) == 1 + (i == e.asked) for i, b in enumerate(e.labels)
    )


def _places(
    model: HookedModel,
    examples: Sequence[Example],
    objects: dict[str, int],
    labels: dict[str, int],
) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Tokens of the named places; the object and the first label of the *prompt's* box, which in
    the counterfactual are those of a box that is not asked for."""
    found: dict[str, list[tuple[int, ...]]] = {
        key: [] for key in ("object", "previous label", "query label", "last")
    }
    for e in examples:
        ids = model.template.render(e.text).ids
        previous, query = places_of(ids, labels[e.labels[e.asked]])
        found["object"].append((places_of(ids, objects[e.objects[e.asked]])[0],))
        found["previous label"].append((previous,))
        found["query label"].append((query,))
        found["last"].append((len(ids) - 1,))
    return {key: tuple(rows) for key, rows in found.items()}
