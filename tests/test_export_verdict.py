"""Every known fault of an export gets its own verdict; the right one and only the right one passes.

The program is played by our own model under another edit than the one that was meant; the same
faults are tried on real servers in `tests/serving`.
"""

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import hooked, tokenizer, words

from probes import HookedModel
from probes.engines import Batch, Edit
from probes.sites import Site
from steering import HeadOffsets, Origin, Schedule, Steering, SteeringVector
from steering.export.replays import Ids, Replay, gap
from steering.export.verdict import Verdict, verify
from steering.export.verdict_page import page, write_verdict
from steering.export.ways import MEANT, NONE

PROMPTS = [tuple(hooked().template.render(text).ids) for text in words(3, 5)]


class Played:
    """Our model as a serving program, under the edits that it makes of the export."""

    name, version = "a program", "1.0"

    def __init__(
        self,
        edits: Sequence[Edit],
        kind: str = "logits",
        model: HookedModel | None = None,
        noise: float = 0.0,
        baked: bool = False,
    ) -> None:
        self.edits, self.kind, self.noise, self.baked = edits, kind, noise, baked
        self.model = hooked() if model is None else model
        self.generator = torch.Generator().manual_seed(0)

    def replay(self, prompts: Sequence[Ids], n_tokens: int, steered: bool) -> list[Replay] | None:
        if self.baked and not steered:
            return None
        with self.model.edit(self.edits if steered else ()):
            return [self.answer(prompt, n_tokens) for prompt in prompts]

    def answer(self, prompt: Ids, n_tokens: int) -> Replay:
        """Token by token and without a cache: another way than the verdict's own."""
        ids, rows = list(prompt), []
        for _ in range(n_tokens):
            batch = Batch(
                torch.tensor([ids]),
                torch.ones(1, len(ids), dtype=torch.long),
                n_prompt=torch.tensor([len(prompt)]),
            )
            row = self.model.engine.logits(batch, 1)[0, 0]
            row = row + self.noise * torch.randn(row.shape, generator=self.generator)
            rows.append(row)
            ids.append(int(row.argmax()))
        logits, tokens = torch.stack(rows), tuple(ids[len(prompt) :])
        if self.kind == "logits":
            return Replay(prompt, tokens, logits=logits)
        if self.kind == "tokens":
            return Replay(prompt, tokens)
        top = logits.double().log_softmax(-1).topk(5)
        each = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return Replay(prompt, tokens, top=tuple(dict(zip(i, p, strict=True)) for i, p in each))


def vector(layer: int = 1) -> SteeringVector:
    v = torch.randn(64, generator=torch.Generator().manual_seed(1))
    return SteeringVector({Site(layer, "resid_post"): 3 * v / v.norm()}, Origin.of(hooked()))


def judged(program: Played, meant: Steering | None = None) -> Verdict:
    return verify(hooked(), meant or Steering(vector()), program, PROMPTS, target="gguf")


FAULTS = {
    "one block late": Steering(vector(2)),
    "one block early": Steering(vector(0)),
    "twice as strong": Steering(vector(), 2.0),
    "half as strong": Steering(vector(), 0.5),
    "the other sign": Steering(vector(), -1.0),
    "at prompt tokens only": Steering(vector(), schedule=Schedule("prompt")),
    "at generated tokens only": Steering(vector(), schedule=Schedule("generated")),
}


@pytest.mark.parametrize("kind", ["logits", "top"])
def test_what_was_meant_is_equal(kind: str) -> None:
    found = judged(Played(Steering(vector()).edits(hooked()), kind))
    assert found.outcome == "equal" and found.verified
    assert found.diagnosis == MEANT
    assert found.explained == pytest.approx(1, abs=1e-5)
    assert found.effect > 100 * found.allowed


@pytest.mark.parametrize("kind", ["logits", "top"])
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_told_by_name(fault: str, kind: str) -> None:
    found = judged(Played(FAULTS[fault].edits(hooked()), kind))
    assert (found.outcome, found.diagnosis) == ("different", fault)
    assert fault in str(found)
    others = {way: size for way, size in found.gaps.items() if way != fault}
    assert min(others.values()) > 10 * found.allowed


@pytest.mark.parametrize("kind", ["logits", "top"])
def test_an_ignored_vector_is_not_applied(kind: str) -> None:
    found = judged(Played((), kind))
    assert found.outcome == "not applied" and not found.verified
    assert found.explained == pytest.approx(0, abs=1e-5)
    assert str(found).startswith("NOT APPLIED")


def test_a_fault_without_a_name_is_different_with_the_nearest_way() -> None:
    found = judged(Played(Steering(vector(), 1.3).edits(hooked())))
    assert found.outcome == "different"
    assert found.diagnosis == f"nearest, though not equal: {MEANT}"


def test_another_model_is_told_from_a_fault() -> None:
    other = copy.deepcopy(hooked().model)
    with torch.no_grad():
        for weight in other.parameters():
            generator = torch.Generator().manual_seed(0)
            weight.add_(0.1 * weight.std() * torch.randn(weight.shape, generator=generator))
    stranger = HookedModel(other, tokenizer(), name="another")
    found = judged(Played(Steering(vector()).edits(stranger), model=stranger))
    assert found.outcome == "another model"
    # baked, there is no unsteered answer to compare: it is at least not called equal
    baked = judged(Played(Steering(vector()).edits(stranger), model=stranger, baked=True))
    assert baked.outcome == "different" and baked.floor is None


def test_a_program_of_little_precision_sets_its_own_floor() -> None:
    """Noise of a hundredth of a logit: equal within it; an effect below it cannot be told."""
    strong = judged(Played(Steering(vector()).edits(hooked()), noise=0.01))
    assert strong.outcome == "equal"
    assert strong.floor is not None and strong.allowed == 3 * strong.floor
    weak = Steering(vector(), 1e-3)
    found = judged(Played(weak.edits(hooked()), noise=0.01), weak)
    assert found.outcome == "cannot tell"
    ignored = judged(Played((), noise=0.01))
    assert ignored.outcome == "not applied"


@pytest.mark.parametrize("fault", [*FAULTS, "ignored"])
@pytest.mark.parametrize(("noise", "strength"), [(0.01, 0.1), (0.03, 0.5), (0.0, 1e-4)])
def test_no_fault_is_called_equal_where_the_program_is_inexact(
    noise: float, strength: float, fault: str
) -> None:
    """An effect near the floor is no ground for a verdict, whichever way the noise falls."""
    meant = Steering(vector(), strength)
    served = replace(FAULTS[fault], strength=strength * FAULTS[fault].strength).edits(hooked()) if (
        fault in FAULTS
    ) else ()  # fmt: skip
    assert judged(Played(served, noise=noise), meant).outcome != "equal"


def test_answers_of_one_token_cannot_tell_where_steering_acts() -> None:
    one = Played(Steering(vector(), schedule=Schedule("prompt")).edits(hooked()))
    found = verify(hooked(), Steering(vector()), one, PROMPTS, 1, target="gguf")
    assert found.outcome == "cannot tell"
    assert found.rivals == ("at prompt tokens only",)
    assert "the answers would be the same at prompt tokens only" in str(found)


def test_a_program_that_gives_nan_is_another_model_and_its_verdict_is_kept(tmp_path: Path) -> None:
    broken = Played(Steering(vector()).edits(hooked()), noise=float("nan"))
    found = judged(broken)
    assert found.outcome == "another model"
    assert found.diagnosis == "none of these ways comes near"
    write_verdict(found, tmp_path / "verdict")
    assert Verdict.load(tmp_path / "verdict").outcome == "another model"


def test_text_alone_tells_equal_from_ignored() -> None:
    strong = Steering(vector(), 4.0)
    assert judged(Played(strong.edits(hooked()), "tokens"), strong).outcome == "equal"
    assert judged(Played((), "tokens"), strong).outcome == "not applied"
    weak = Steering(vector(), 1e-4)
    assert judged(Played((), "tokens"), weak).outcome == "cannot tell"


def test_ablation_and_head_offsets_are_judged_too() -> None:
    model = hooked()
    ablated = Steering(vector().doing("ablate").everywhere(model))
    assert judged(Played(ablated.edits(model), baked=True), ablated).outcome == "equal"
    assert judged(Played((), baked=True), ablated).outcome == "not applied"
    width = model.layout.blocks[0].widths["head_out"]
    heads = Steering(HeadOffsets({(1, 2): torch.ones(width)}, Origin.of(model)))
    assert judged(Played(heads.edits(model), baked=True), heads).outcome == "equal"
    found = judged(Played(replace(heads, strength=2.0).edits(model), baked=True), heads)
    assert found.diagnosis == "twice as strong"


def test_answers_that_end_before_they_begin_are_left_out() -> None:
    class Silent(Played):
        def answer(self, prompt: Ids, n_tokens: int) -> Replay:
            return Replay(prompt, ()) if prompt == PROMPTS[0] else super().answer(prompt, n_tokens)

    found = judged(Silent(Steering(vector()).edits(hooked())))
    assert found.outcome == "equal" and found.n_prompts == len(PROMPTS) - 1
    with pytest.raises(ValueError, match="no token for any prompt"):
        verify(hooked(), Steering(vector()), Silent(()), PROMPTS[:1], target="gguf")


def test_nan_from_a_program_is_never_equal() -> None:
    replay = Replay(PROMPTS[0], (5,), logits=torch.full((1, 200), torch.nan))
    assert gap([replay], [torch.zeros(1, 200)]).largest == torch.inf


def test_a_verdict_is_saved_loaded_and_shown_with_texts_escaped(tmp_path: Path) -> None:
    found = judged(Played(FAULTS["one block late"].edits(hooked())))
    hostile = replace(found, consumer="<script>alert(1)</script>", notes=("<img src=x>",))
    path = write_verdict(hostile, tmp_path / "verdict")
    text = path.read_text()
    assert "<script>" not in text and "<img" not in text and "&lt;script&gt;" in text
    assert "applied but different" in text and "Found: one block late." in text
    assert "<svg" in text and 'src="http' not in text and 'href="http' not in text
    back = Verdict.load(tmp_path / "verdict")
    assert back.gaps == dict(found.gaps) and back.outcome == "different"
    assert json.loads((tmp_path / "verdict" / "result.json").read_text())["floor"] == found.floor
    assert len(found.frame()) == len(found.gaps)


def test_the_page_of_each_outcome_says_what_it_means() -> None:
    equal = judged(Played(Steering(vector()).edits(hooked())))
    for outcome, said in (
        ("equal", "are those of the edit that was meant"),
        ("not applied", "Do not use this export"),
        ("another model", "nothing can be said of the vector"),
        ("cannot tell", "do not tell what was meant from something else"),
        ("format checked", "was not run"),
    ):
        assert said in page(replace(equal, outcome=outcome))


def test_the_gaps_are_measured_along_the_programs_own_tokens() -> None:
    """Not applied is exact, although steered and unsteered answers go different ways."""
    found = judged(Played(()))
    assert found.gaps[NONE] < 1e-4 < found.gaps[MEANT]
