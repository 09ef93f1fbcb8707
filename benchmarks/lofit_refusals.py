"""Can offsets on a tenth of the heads make the base of the built-in lineage refuse?

    python benchmarks/lofit_refusals.py               killed and run again, it goes on
    python benchmarks/lofit_refusals.py --quick       a small slice of it

SFT (3 epochs, batches of 8) on 32 topics of the training split (`steering.refusal_task`): harmful
requests are refused, their harmless twins answered by the first tokens of the base's own greedy
answer, so that refusing everything costs. Settings are chosen by refusals of harmful less refusals
of harmless validation twins; figures are of the test split: rates, and their difference (`margin`).

    lofit    27 of the 270 heads by step A; learning rate of step v x L1 factor of step A
    random   27 heads drawn by chance; learning rate x draw
    iti      alpha x number of heads, on all tokens
    lora     rank 8 on q and v; learning rate x alpha
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from lofit_study import Cells, Grid, Study, summarise

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # before this folder, where scripts may be named as packages are
HEADS = {"lofit-10": 27, "random-10": 27}
LEARNING = (1e-2, 2e-2, 4e-2)
GRID: dict[str, Grid] = {
    "unmodified": ((0.0,), (0.0,)),
    "iti": ((1.0, 2.5, 5.0), (27.0, 54.0)),
    "random-10": (LEARNING, (0.0, 1.0)),
    "lofit-10": (LEARNING, (5e-4, 5e-3)),
    "lora": ((3e-4, 1e-3, 3e-3), (8.0, 16.0)),
}
JUDGED = 6
"""Tokens of answers that are judged."""


class Refusals(Study):
    """Refusals learned from examples, measured on twins."""

    grid, n_heads = GRID, HEADS

    def __init__(self, out: Path, quick: bool, limit: int | None = None) -> None:
        from probes import HookedModel, datasets

        self.quick, self.topics, self.epochs = quick, 16 if quick else 32, 1 if quick else 3
        self.model = HookedModel.load("builtin:base", device="cpu")
        # of validation every other topic, to choose in half the time
        every = {"validation": 20 if quick else 2, "test": 10 if quick else 1}
        self.twins = {part: datasets.twins(part)[::n] for part, n in every.items()}
        settings = {
            "model": self.model.fingerprint,
            "topics": self.topics,
            "every": every,
            "epochs": self.epochs,
            "heads": HEADS,
            "judged": JUDGED,
        }
        self.cells = Cells(out, settings, limit)

    def examples(self) -> list[Any]:
        """What is learned; the base's own answers are generated once."""
        from steering.preferences import Preference
        from steering.refusal_task import refusal_examples

        def make(_: Path) -> dict[str, Any]:
            found = refusal_examples(self.model, "train", self.topics)
            return {"examples": [[e.prompt, e.chosen, e.topic] for e in found]}

        rows = self.cells.kept("examples", make)["examples"]
        return [Preference(prompt, chosen, topic=topic) for prompt, chosen, topic in rows]

    def training(self, seed: int, lr: float, knob: float | None = None) -> Any:
        from steering.preferences import SFT
        from steering.tuning import Training

        return Training(loss=SFT(), lr=lr, epochs=self.epochs, batch_size=8, seed=seed)

    def lora_options(self, knob: float) -> dict[str, Any]:
        return {"alpha": knob}

    def contrast(self) -> tuple[Any, list[str] | None]:
        from probes import datasets

        return datasets.safety("train").limited(self.topics, 0), None

    def measure(self, steer: Any, part: str) -> dict[str, list[float]]:
        from probes.refusals import refuses

        found = {}
        for kind in ("harmful", "harmless"):
            asked = [t[kind] for t in self.twins[part]]
            answers = self.model.generate(asked, JUDGED, steer=steer)
            found[kind] = [float(refuses(a)) for a in answers]
        pairs = zip(found["harmful"], found["harmless"], strict=True)
        return {**found, "margin": [a - b for a, b in pairs]}

    def merit(self, found: dict[str, list[float]]) -> float:
        return sum(found["margin"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Refusals learned by offsets on heads.")
    parser.add_argument("--out", type=Path, default=Path("lofit-refusals"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cells", type=int, help="stop after so many new ones")
    parser.add_argument("--only", nargs="*", choices=list(GRID), help="these beside unmodified")
    arguments = parser.parse_args()
    out = arguments.out / "quick" if arguments.quick else arguments.out
    study = Refusals(out, arguments.quick, arguments.cells)
    methods = ["unmodified", *[m for m in arguments.only or GRID if m != "unmodified"]]
    summarise(study, out, methods, [t["topic"] for t in study.twins["test"]])


if __name__ == "__main__":
    main()
