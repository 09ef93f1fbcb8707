"""Indirect object identification: who is given something.

"Then Mary and John went to the store, and John gave a drink to" goes on with " Mary", the name
that stands once (Wang et al. 2023, https://arxiv.org/abs/2211.00593; templates and names are ours).
"""

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

_NAMES = (
    "Mary John Tom James Daniel Sarah David Emma Paul Anna Mark Laura Peter Lucy Simon Alice Robert "
    "Helen Frank Susan George Karen Kevin Linda Brian Maria Jason Rachel Adam Amy Eric Kate Steven "
    "Jane Andrew Lisa Scott Julia Michael Sophie William Emily Charles Rose Henry Diana Martin Claire "
    "Jack Olivia Ryan Jessica Matthew Rebecca Joseph Martha Thomas Anne Richard Ruth Edward Grace "
    "Arthur Alex Ben Sam Luke Max Leo Oscar Jennifer Elizabeth Michelle Patricia Barbara Nancy"
)
NAMES = tuple(_NAMES.split())
_PLACES = "store park school office station garden library museum market beach"
PLACES = tuple(_PLACES.split())
_THINGS = "drink book ring ball letter gift ticket map key flower"
THINGS = tuple(_THINGS.split())
TEMPLATES = (
    "Then {a} and {b} went to the {place}, and {s} gave a {thing} to",
    "When {a} and {b} met at the {place}, {s} decided to give a {thing} to",
    "Yesterday {a} and {b} spent the day at the {place}. In the evening {s} handed a {thing} to",
    "While {a} and {b} were working at the {place}, {s} passed a {thing} to",
    "After {a} and {b} had lunch near the {place}, {s} sent a {thing} to",
)
COUNTERFACTUALS = {
    "swap": "the second subject is the other name, which makes the subject the answer",
    "ABC": "the second subject is a third name, which leaves the answer open",
}


class Example(NamedTuple):
    """One sentence: who receives, who gives, and a name that stands nowhere."""

    template: str
    receiver: str
    giver: str
    third: str
    place: str
    thing: str
    giver_first: bool

    def text(self, second: str) -> str:
        first = (self.giver, self.receiver) if self.giver_first else (self.receiver, self.giver)
        return self.template.format(
            a=first[0], b=first[1], s=second, place=self.place, thing=self.thing
        )


def indirect_object(
    model: HookedModel,
    part: str = "test",
    n: int = 60,
    *,
    counterfactual: str = "swap",
    seed: int = 0,
) -> Task:
    """`n` prompts, every template and both orders of the names in turn; parts share no name.

    Names are one token each. `counterfactual` is one of `COUNTERFACTUALS`. The metric is
    logit(indirect object) - logit(subject); chance for a model that names one of the two is 1/2.
    """
    name = "indirect-object"
    plain_text(model, name)
    if counterfactual not in COUNTERFACTUALS:
        raise ValueError(
            f"counterfactual {counterfactual!r}: choose one of {', '.join(COUNTERFACTUALS)}"
        )
    draw = generator(part, seed, name)
    names = single_tokens(model, dealt(NAMES, part))
    able = sorted(enough(list(names), 3, f"names of the part {part}", name, model))
    turn = 0

    def one() -> Example | None:
        nonlocal turn
        template = TEMPLATES[turn % len(TEMPLATES)]
        first = bool(turn // len(TEMPLATES) % 2)
        people = draw.sample(able, 3)
        receiver, giver, third = people
        place, thing = draw.choice(PLACES), draw.choice(THINGS)
        made = Example(template, receiver, giver, third, place, thing, first)
        text = made.text(made.giver)
        ids = ids_of(model, text)
        counts = [len(places_of(ids, names[who])) for who in people]
        if counts != [1, 2, 0] or not known(model, text):
            return None
        turn += 1
        return made

    examples = list(drawn(one, n, name))
    answers = tuple(names[e.receiver] for e in examples)
    others = tuple(names[e.giver] for e in examples)
    places: dict[str, list[tuple[int, ...]]] = {
        key: [] for key in ("subject1", "subject2", "object", "end")
    }
    for e in examples:
        ids = model.template.render(e.text(e.giver)).ids
        subject1, subject2 = places_of(ids, names[e.giver])
        rows = (subject1, subject2, places_of(ids, names[e.receiver])[0], len(ids) - 1)
        for key, at in zip(places, rows, strict=True):
            places[key].append((at,))
    return Task(
        name=name,
        prompts=tuple(e.text(e.giver) for e in examples),
        counterfactuals=tuple(
            e.text(e.receiver if counterfactual == "swap" else e.third) for e in examples
        ),
        changed=COUNTERFACTUALS[counterfactual],
        answers=answers,
        others=others,
        topics=tuple(f"{name}-{part}-{i:04d}" for i in range(n)),
        metric=LogitDifference(answers, others),
        chat=False,
        places={key: tuple(rows) for key, rows in places.items()},
    )
