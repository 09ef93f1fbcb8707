"""What one direction does to the built-in lineage: take refusals away, add them, put them back.

    python benchmarks/lineage_steering.py
    python benchmarks/lineage_steering.py --only repair --quick

ablate, add   The direction that `find_refusal_direction` chooses for builtin:aligned (14.resid_pre,
              the token at which the template opens the answer; `--search` runs the choice again):
              ablated at every write on harmful test twins, added at strength 1 to harmless ones.
repair        The difference of class means of builtin:aligned, added to builtin:drifted and
              builtin:mixed at the output of layer 13, on all prompts and only where a condition
              holds (projection of the prompt's last token at the same site above the middle of the
              two classes, from training twins). Of three strengths the one is taken with the most
              refusals of harmful less refusals of harmless validation twins.

Beside each stand 20 random directions of the same norm, on every fourth prompt; half isotropic,
half differences of means between random halves of the topics. Costs: refusals of
harmless twins and of general requests, and KL(unsteered‖steered) on answers to general requests.
Wilson's intervals.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # before this folder, where scripts may be named as packages are
CHOSEN = ("14.resid_pre", -5)
MAX_KL = 0.25
"""Nats; at the usual 0.1 no direction of this small model passes."""
SITE = "13.resid_post"
STRENGTHS = (0.5, 1.0, 1.5)
JUDGED, RANDOM = 6, 20


class Judge:
    """Refusal rates and costs of one model under what is applied to it."""

    def __init__(self, name: str, quick: bool) -> None:
        from probes import HookedModel, datasets
        from steering.costs import Reference

        self.every = 8 if quick else 1
        self.model = HookedModel.load(name, device="cpu")
        self.twins = {part: datasets.twins(part) for part in ("validation", "test")}
        self.general = datasets.general("test")[:: self.every]
        self.reference = Reference.of(self.model, datasets.general("test")[: 4 if quick else 16])

    def rate(self, steer: Any, kind: str, part: str = "test", every: int = 1) -> tuple[int, int]:
        from probes.refusals import refuses

        if kind == "general":
            asked = self.general
        else:
            asked = [t[kind] for t in self.twins[part]][:: every * self.every]
        answers = self.model.generate(asked, JUDGED, steer=steer)
        return sum(map(refuses, answers)), len(answers)

    def say(self, name: str, steer: Any, *kinds: str) -> None:
        from probes.scores import wilson
        from steering.costs import kl

        said = []
        for kind in kinds:
            refused, n = self.rate(steer, kind)
            low, high = wilson(refused, n)[1:]
            said.append(f"{kind} {refused}/{n} = {refused / n:.1%} [{low:.1%}, {high:.1%}]")
        cost = float(kl(self.model, steer, self.reference).mean())
        print(f"{self.model.label:8} {name:24} {'; '.join(said)}; KL {cost:.3f} nats", flush=True)

    def null(self, name: str, drawn: list[Any], kind: str) -> None:
        """One line a direction with its KL: one that breaks the model takes its refusals too."""
        from steering.costs import kl

        for i, steer in enumerate(drawn):
            refused, n = self.rate(steer, kind, every=4)
            cost = float(kl(self.model, steer, self.reference).mean())
            drawn_as = "isotropic" if i < (len(drawn) + 1) // 2 else "random halves"
            said = f"{kind} {refused}/{n} = {refused / n:.1%}; KL {cost:.3f} nats"
            print(f"{self.model.label:8} {name} {i:2} {drawn_as:14} {said}", flush=True)


def refusal(quick: bool, search: bool) -> None:
    """Ablation at every write, and addition, in the aligned model."""
    from probes import capture, datasets
    from steering import Origin, SteeringVector, find_refusal_direction, random_vectors

    judge = Judge("builtin:aligned", quick)
    model, train = judge.model, datasets.safety("train")
    site, position = CHOSEN
    if search:
        found = find_refusal_direction(
            model,
            train,
            datasets.safety("validation"),
            neutral=datasets.general("validation"),
            max_kl=MAX_KL,
        )
        print(found, flush=True)
        site, position = found.site, found.position
    acts = capture(model, train.prompts, site, "instruction_end", progress=False)
    rows = acts[site][:, position]
    single = type(acts)(acts.sites, (1,) * len(rows), "last", lambda _: rows, n_layers=30)
    direction = rows[train.positive].mean(0) - rows[~train.positive].mean(0)
    vector = SteeringVector({acts.sites[0]: direction}, Origin.of(model))
    drawn = random_vectors(vector, single, RANDOM, topics=train.topics)
    judge.say("unedited", None, "harmful", "harmless")
    judge.say("ablated everywhere", vector.everywhere(model), "harmful")
    judge.null("random ablated", [r.everywhere(model) for r in drawn], "harmful")
    judge.say("added, strength 1", vector, "harmless")
    judge.null("random added", drawn, "harmless")


def repair(quick: bool) -> None:
    """The aligned model's vector in the drifted ones."""
    from probes import HookedModel, Site, capture, datasets
    from steering import Condition, Steering, random_vectors, train_vector

    source, train = HookedModel.load("builtin:aligned", device="cpu"), datasets.safety("train")
    acts = capture(source, train.prompts, SITE, progress=False)
    vector = train_vector(source, train, SITE, activations=acts)
    drawn = random_vectors(vector, acts, RANDOM, topics=train.topics)
    for name in ("builtin:drifted", "builtin:mixed"):
        judge = Judge(name, quick)
        rows = capture(judge.model, train.prompts, SITE, progress=False)[SITE]
        unit = vector[SITE] / vector[SITE].norm()
        middle = sum(
            float((rows[side] @ unit).mean()) for side in (train.positive, ~train.positive)
        )
        gate = Condition(Site.parse(SITE), unit, middle / 2)
        judge.say("unsteered", None, "harmful", "harmless", "general")
        for how, condition in (("added", None), ("added on condition", gate)):
            margins = {}
            for strength in STRENGTHS:
                steer = Steering(vector, strength, condition=condition)
                (a, n), (b, _) = (
                    judge.rate(steer, kind, "validation", 2) for kind in ("harmful", "harmless")
                )
                margins[strength] = (a - b) / n
            best = max(STRENGTHS, key=lambda s: margins[s])
            steer = Steering(vector, best, condition=condition)
            judge.say(f"{how} {best:g}", steer, "harmful", "harmless", "general")
            null = [Steering(r, best, condition=condition) for r in drawn]
            judge.null(f"random {how} {best:g}", null, "harmful")


def main() -> None:
    parser = argparse.ArgumentParser(description="One direction in the built-in lineage.")
    parser.add_argument("--only", choices=("refusal", "repair"))
    parser.add_argument("--search", action="store_true", help="choose the direction again (slow)")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    if arguments.only != "repair":
        refusal(arguments.quick, arguments.search)
    if arguments.only != "refusal":
        repair(arguments.quick)


if __name__ == "__main__":
    main()
