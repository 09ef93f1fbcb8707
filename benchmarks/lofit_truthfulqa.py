"""TruthfulQA with SmolLM2-135M: LoFiT beside ITI, random heads and LoRA, tuned alike.

    python benchmarks/lofit_truthfulqa.py               the grid; killed and run again, it goes on
    python benchmarks/lofit_truthfulqa.py --quick       a small slice of it, in minutes

408 questions (`tests/data/README.md`) are split by question with seed 0 into 204 for training, 69
for choices and 135 for figures. Training is DPO (beta 0.5, 3 epochs, batches of 8) on one pair a
question, best and first false answer behind `Q: ... A:`; evaluation puts the instruction and six
examples of `truthfulqa_primer.txt` first and scores every answer (MC1, MC2). Settings are chosen
by validation MC2.

    lofit    K = 3 % or 10 % of the 270 heads; learning rate of step v x L1 factor of step A
    random   K = 3 % of the heads drawn by chance; learning rate x draw
    iti      alpha x number of heads, on all tokens
    lora     rank 8 on q and v; learning rate x DPO's beta

A finished cell is a folder with `cell.json`; nothing finished is computed again. At the end tables
(`table.csv`, `differences.csv`) and figures are written.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from lofit_study import Cells, Grid, Study, summarise

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # before this folder, where scripts may be named as packages are
DATA = ROOT / "tests" / "data"
FRACTIONS = {"train": 0.5, "validation": 0.17, "test": 0.33}
HEADS = {"lofit-3": 8, "lofit-10": 27, "random-3": 8}
LEARNING = (3e-3, 1e-2, 3e-2)
GRID: dict[str, Grid] = {
    "unmodified": ((0.0,), (0.0,)),
    "iti": ((5.0, 10.0, 15.0), (8.0, 27.0)),
    "random-3": (LEARNING, (0.0, 1.0)),
    "lofit-3": (LEARNING, (5e-4, 5e-3)),
    "lofit-10": (LEARNING, (5e-4, 5e-3)),
    "lora": ((1e-4, 3e-4, 1e-3), (0.1, 0.5)),
}


class TruthfulQA(Study):
    """Preferences between true and false answers, measured by the choice between all of them."""

    grid, n_heads = GRID, HEADS

    def __init__(self, out: Path, quick: bool, limit: int | None = None) -> None:
        from probes import HookedModel
        from probes.splits import split
        from steering.preferences import Preference
        from steering.questions import truthfulqa

        self.quick, self.epochs = quick, 1 if quick else 3
        self.model = HookedModel.load("builtin:base", device="cpu", template="none")
        questions = truthfulqa(DATA / "truthfulqa_train.csv", DATA / "truthfulqa_val.csv")
        parts = split([q.question for q in questions], fractions=FRACTIONS, seed=0)
        cut = {"train": 24, "validation": 12, "test": 16} if quick else {}
        self.questions = {
            name: [questions[i] for i in rows.tolist()[: cut.get(name)]]
            for name, rows in parts.items()
        }
        self.pairs = [
            Preference(f"Q: {q.question} A:", f" {q.best}", f" {q.false[0]}")
            for q in self.questions["train"]
        ]
        self.primer = (DATA / "truthfulqa_primer.txt").read_text(encoding="utf-8").rstrip() + "\n\n"
        settings = {
            "model": self.model.fingerprint,
            "questions": {name: len(part) for name, part in self.questions.items()},
            "primer": self.primer,
            "epochs": self.epochs,
            "heads": HEADS,
        }
        self.cells = Cells(out, settings, limit)

    def examples(self) -> list[Any]:
        return self.pairs

    def training(self, seed: int, lr: float, knob: float | None = None) -> Any:
        from steering.preferences import DPO
        from steering.tuning import Training

        beta = 0.5 if knob is None else knob
        return Training(loss=DPO(beta), lr=lr, epochs=self.epochs, seed=seed)

    def contrast(self) -> tuple[Any, list[str] | None]:
        from probes.contrast import Contrast

        asked = [(q, a) for q in self.questions["train"] for a in q.answers]
        contrast = Contrast.labelled(
            [f"Q: {q.question} A:" for q, _ in asked],
            [int(a in q.true) for q, a in asked],
            topics=[q.question for q, _ in asked],
            name="TruthfulQA",
        )
        return contrast, [f" {a}" for _, a in asked]

    def measure(self, steer: Any, part: str) -> dict[str, list[float]]:
        from steering.choices import MEASURES, score_choices

        found = score_choices(self.model, self.questions[part], primer=self.primer, steer=steer)
        return {name: found.values(name).tolist() for name in MEASURES}

    def merit(self, found: dict[str, list[float]]) -> float:
        return sum(found["mc2"])


def main() -> None:
    parser = argparse.ArgumentParser(description="LoFiT and its rivals on TruthfulQA.")
    parser.add_argument("--out", type=Path, default=Path("lofit-truthfulqa"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cells", type=int, help="stop after so many new ones")
    parser.add_argument("--only", nargs="*", choices=list(GRID), help="these beside unmodified")
    arguments = parser.parse_args()
    out = arguments.out / "quick" if arguments.quick else arguments.out
    study = TruthfulQA(out, arguments.quick, arguments.cells)
    methods = ["unmodified", *[m for m in arguments.only or GRID if m != "unmodified"]]
    sizes = {name: len(part) for name, part in study.questions.items()}
    print(f"questions: {sizes}; {len(study.pairs)} training pairs", flush=True)
    summarise(study, out, methods, [q.question for q in study.questions["test"]])


if __name__ == "__main__":
    main()
