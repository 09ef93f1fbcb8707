"""Laws of circuits: what is kept, what is ablated, what a search finds and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_copying
import torch
from architectures import build
from torch import Tensor

from analyses.mechanisms.ablation import Ablation
from analyses.mechanisms.circuit import Circuit, all_heads, all_mlps
from analyses.mechanisms.completeness import Completeness, Minimality, completeness, minimality
from analyses.mechanisms.discovery import Discovery, Stage, discover, receiving
from analyses.mechanisms.faithfulness import (
    Faithfulness,
    FaithfulnessCurve,
    faithfulness,
    faithfulness_curve,
)
from analyses.mechanisms.task import Task
from analyses.patching.metrics import LogitDifference
from probes import HookedModel
from probes.sites import Site

COPY = f"{tiny_copying.HEAD[0]}.head_out.{tiny_copying.HEAD[1]}"


def task(part: str = "test", n: int = 12) -> Task:
    """The last word but one is the answer; topics of the parts are disjoint."""
    pairs = [(k % 12, (k + 5) % 12) for k in range(n)]
    extra = " w60" if part == "train" else ""
    texts = [
        tuple(f"w50{extra} {tiny_copying.word(k)} w51" for k in side)
        for side in zip(*pairs, strict=True)
    ]
    answers, others = (
        tuple(tiny_copying.WORDS[k] for k in side) for side in zip(*pairs, strict=True)
    )
    return Task(
        "copying", texts[0], texts[1], "the word", answers, others,
        tuple(f"{part} {k}" for k in range(n)), LogitDifference(answers, others), True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def copying() -> HookedModel:
    return HookedModel(tiny_copying.copying(), tiny.tokenizer(), name="copying")


def whole(model: HookedModel) -> Circuit:
    return Circuit.of(model, {"heads": all_heads(model), "mlps": all_mlps(model)})


def error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("kind", ["mean", "zero", "resample", "counterfactual"])
@pytest.mark.parametrize("name", ["llama", "gpt-neox"])
def test_the_whole_model_is_exactly_faithful(name: str, kind: str) -> None:
    model = tiny.hooked(name)
    found = faithfulness(
        model, task(), whole(model), ablation=kind, draws=0, resamples=200, progress=False
    )
    assert torch.equal(found.alone, found.full) and not torch.equal(found.empty, found.full)
    assert found.normalised.tolist() == [1, 1, 1] and found.ratio.tolist() == [1, 1, 1]
    less = Circuit.of(model, {"all": [s for s in whole(model).sites if str(s) != "1.head_out.2"]})
    other = faithfulness(model, task(), less, ablation=kind, draws=0, resamples=200, progress=False)
    assert float((other.alone - other.full).abs().median()) > 1e-3


def test_with_counterfactuals_nothing_kept_leaves_what_embeddings_say() -> None:
    """Heads and MLPs of the counterfactual run beside the prompt's own embeddings, by hand."""
    model = tiny.hooked()
    own = task()
    runs = Ablation(model, own, "counterfactual", mlps=True)
    (found,) = runs.logits([{}])
    read = model.engine.read
    from probes.engines import Batch

    sites = [Site(n, part) for n in range(3) for part in ("attn_out", "mlp_out")]
    plain: Any = model.model
    for i in (0, 7):
        rows = []
        for ids in (runs.patcher.ids[i], runs.patcher.values.ids[i]):
            batch = Batch(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))
            rows.append(read(batch, [*sites, Site(0, "resid_pre")]))
        stream = rows[0][Site(0, "resid_pre")][0, -1] + sum(rows[1][s][0, -1] for s in sites)
        want = plain.lm_head(plain.model.norm(stream)).detach()
        assert error(found[i], want) < 1e-5 < error(runs.patcher.target_logits[i], want)


def test_means_stand_at_their_places() -> None:
    """By place where prompts agree, one mean between; against a loop over single prompts."""
    model = tiny.hooked()
    texts = tuple(f"w{k} w{k + 1}" + " w9" * (k % 3) for k in range(6))
    own = Task(
        "words", texts, texts, "nothing", (30,) * 6, (31,) * 6, tuple("abcdef"),
        LogitDifference((30,) * 6, (31,) * 6), True,
    )  # fmt: skip
    runs = Ablation(model, own, "mean")
    site = Site(1, "head_out")
    from probes.engines import Batch

    rows = []
    for ids in runs.patcher.ids:
        batch = Batch(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))
        rows.append(model.engine.read(batch, [site])[site][0])
    ids = runs.patcher.ids
    start = next(k for k in range(99) if len({row[k] for row in ids}) > 1)
    end = next(k for k in range(99) if len({row[-k - 1] for row in ids}) > 1)
    assert start > 3 and end >= 2
    made = runs._values[site]
    assert error(made[2][2], torch.stack([h[2] for h in rows]).mean(0)) < 1e-6
    assert error(made[2][-2], torch.stack([h[-2] for h in rows]).mean(0)) < 1e-6
    middle = torch.cat([h[start : len(h) - end] for h in rows]).mean(0)
    assert error(made[2][start], middle) < 1e-6 and len(made[2]) == len(ids[2])
    assert error(made[2][start], made[2][start - 1]) > 1e-2
    same = Ablation(model, task(), "mean")  # prompts of one length: every token by its place
    assert not torch.equal(same._values[site][0][-4], same._values[site][0][-5])


def test_ablated_engines_agree_and_batches_are_single_prompts() -> None:
    circuit = ["0.head_out.1", "1.head_out.2", "2.head_out.0"]
    kept = {Site.parse(s): None for s in circuit}
    found = []
    for engine in ("transformers", "transformer_lens", "nnsight"):
        model = HookedModel(build("llama"), tiny.tokenizer(), engine=engine)
        found.append(Ablation(model, task(), "counterfactual").logits([kept])[0])
    assert all(error(other, found[0]) < 1e-5 for other in found[1:])
    model = tiny.hooked()
    for i in (0, 5):
        alone = Ablation(model, task().only([i]), "counterfactual", batch_size=1)
        assert error(alone.logits([kept])[0][0], found[0][i]) < 1e-5


def test_places_hold_row_by_row() -> None:
    model = tiny.hooked()
    own = task()
    lengths = [len(r.ids) for r in own.rendered(model)[0]]
    places = tuple((n - 1 - i % 3,) for i, n in enumerate(lengths))
    runs = Ablation(model, own, "zero")
    site = Site(2, "head_out", 1)
    rest = {s: None for s in all_heads(model) if s != site}
    (found,) = runs.logits([{**rest, site: places}])
    for i in (0, 1, 5):
        single = Ablation(model, own.only([i]), "zero", batch_size=1)
        (want,) = single.logits([{**rest, site: (places[i],)}])
        assert error(found[i], want[0]) < 1e-5
    # kept at the last token alone, the last block's head loses nothing that is read
    assert error(found[0], runs.patcher.target_logits[0]) < 1e-5
    assert error(found[1], runs.patcher.target_logits[1]) > 1e-4


def test_a_search_finds_the_planted_head(copying: HookedModel, tmp_path: Path) -> None:
    stages = [Stage("copying", 1, at="last"), Stage("before", 3, "copying", "v")]
    found = discover(copying, task("train"), stages, draws=4, resamples=200, progress=False)
    assert found.groups["copying"] == (COPY,) and found.ranked[0] == Site.parse(COPY)
    assert found.places == {"copying": "last"}
    assert float(found.change[1].abs().nan_to_num().max()) < 0.02 * float(
        found.change[0].abs().max()
    )
    again = Discovery.load(found.save(tmp_path / "found"))
    assert str(again) == str(found) and again.frame().equals(found.frame())
    assert str(again.circuit) == str(found.circuit)
    ax = found.plot()
    assert ax.get_title(loc="left") == "copying: paths to logits"
    assert len(found.plot_all().axes) == 4  # with colour bars
    # and the head does the task alone, at the last token, where other heads do not
    kept = Circuit.of(copying, {"copying": [COPY]}, places={"copying": "last"}, task=task("train"))
    alone = faithfulness(copying, task(), kept, resamples=200, progress=False)
    assert float(alone.normalised[0]) == pytest.approx(1, abs=0.1)
    # of eight heads one drawn at random may be the head itself; the others do nothing
    near = (alone.random - alone.normalised[0]).abs() < 1e-4
    assert int((~near).sum()) > 0 and float(alone.random[~near].abs().max()) < 0.05
    wrong = Circuit.of(copying, {"other": ["1.head_out.3"]})
    none = faithfulness(copying, task(), wrong, draws=4, resamples=200, progress=False)
    assert abs(float(none.normalised[0])) < 0.02 and not none.claimed
    assert Circuit.load(kept.save(tmp_path / "circuit")) == kept
    assert Faithfulness.load(alone.save(tmp_path / "alone")).frame().equals(alone.frame())


def test_signs_and_ranks() -> None:
    from analyses.mechanisms.discovery import chosen

    change = torch.tensor([[1.0, -3.0], [0.0, 2.0], [torch.nan, -0.5]])
    for sign, want in (
        ("absolute", ("0.head_out.1", "1.head_out.1", "0.head_out.0", "2.head_out.1")),
        ("negative", ("0.head_out.1", "2.head_out.1")),
        ("positive", ("1.head_out.1", "0.head_out.0")),
    ):
        assert chosen(change, Stage("a", 9, sign=sign), set()) == want
        assert chosen(change, Stage("a", 1, sign=sign), {want[0]}) == want[1:2]
    model = tiny.hooked()  # four heads share two of keys and values
    heads = [Site(1, "head_out", h) for h in (0, 1, 3)]
    assert list(map(str, receiving(model, heads, "k"))) == ["1.k.0", "1.k.1"]
    assert list(map(str, receiving(model, heads, "q"))) == ["1.q.0", "1.q.1", "1.q.3"]


def test_the_curve_rises_with_the_right_head(copying: HookedModel, tmp_path: Path) -> None:
    rest = [s for s in all_heads(copying) if str(s) != COPY]
    right = [rest[0], Site.parse(COPY), *rest[1:]]
    found = faithfulness_curve(copying, task(), right, resamples=200, progress=False)
    assert found.sizes == (1, 2, 4, 8) and found.random.shape == (4, 10)
    value = found.normalised[:, 0]
    assert abs(float(value[0])) < 0.05 and float(value[1]) > 0.95
    # without MLPs in the ranking they are the model's own: every head is the whole model
    assert found.normalised[-1].tolist() == [1, 1, 1] and bool((found.random[-1] == 1).all())
    assert int((found.random[1] < 0.5).sum()) > 0
    assert FaithfulnessCurve.load(found.save(tmp_path / "curve")).frame().equals(found.frame())
    assert "2 heads reach" in str(found)
    assert found.plot().get_xlabel() == "heads kept, of 8"


def test_completeness_and_minimality(copying: HookedModel, tmp_path: Path) -> None:
    groups = {"copying": [COPY], "others": ["0.head_out.0", "1.head_out.0"]}
    circuit = Circuit.of(copying, groups)
    found = completeness(copying, task(), circuit, draws=6, resamples=200, progress=False)
    assert found.names[:2] == ("copying", "others") and len(found.names) == 8
    # whichever part goes, the circuit does as the model does
    assert float(found.incompleteness[:, 0].max()) < 0.5
    assert float(found.model_without[0]) < 0.5 < 3 < float(found.model_without[1])
    empty = Circuit.of(copying, {"others": ["0.head_out.0", "1.head_out.0"]})
    lacks = completeness(copying, task(), empty, draws=6, resamples=200, progress=False)
    assert float(lacks.incompleteness[0, 0]) > 3  # the model still has the copying head
    need = minimality(copying, task(), circuit, share=0.5, draws=4, resamples=200, progress=False)
    assert dict(zip(need.sites, need.needed, strict=True))[COPY]
    assert float(need.score[need.sites.index(COPY), 0]) > 3
    assert all(
        len(k) == 1 and site not in k for site, k in zip(need.sites, need.partners, strict=True)
    )
    others = [k for k, site in enumerate(need.sites) if site != COPY]
    assert float(need.score[others, 0].abs().max()) < 0.2
    for result, kind in ((found, Completeness), (need, Minimality)):
        again = kind.load(result.save(tmp_path / kind.__name__))
        assert str(again) == str(result) and again.frame().equals(result.frame())
        assert result.plot().get_xlabel()


def test_a_ratio_without_a_denominator_is_not_a_number(copying: HookedModel) -> None:
    def never(logits: Tensor) -> Tensor:
        return torch.zeros(len(logits))

    from dataclasses import replace

    found = minimality(
        copying, replace(task(), metric=never), Circuit.of(copying, {"a": [COPY]}), draws=2,
        resamples=50, progress=False,
    )  # fmt: skip
    assert found.ratio.isnan().all() and found.score[0, 0] == 0


def test_mistakes_are_said(copying: HookedModel) -> None:
    model = copying
    for groups, said in (
        ({}, "the circuit is empty: name at least one head or MLP"),
        ({"a": []}, "the circuit is empty"),
        ({"a": ["1.head_out.9"]}, "site 1.head_out.9 is out of range: layer 1 has 4 heads"),
        ({"a": ["1.q.0"]}, "group 'a' holds 1.q.0: a circuit is made of heads"),
        ({"a": ["1.head_out"]}, "group 'a' holds 1.head_out: a circuit is made of heads"),
        ({"a": [COPY], "b": [COPY]}, "1.head_out.2 is in the groups 'a' and 'b'"),
    ):
        with pytest.raises(ValueError, match=said):
            Circuit.of(model, groups)
    with pytest.raises(ValueError, match="a place is given for the group 'b'"):
        Circuit.of(model, {"a": [COPY]}, places={"b": "last"})
    with pytest.raises(ValueError, match="which has no attention heads"):
        Circuit.of(tiny.hooked("mamba"), {"a": ["0.head_out.0"]})
    chosen = Circuit.of(model, {"a": [COPY]}, task=task("train"))
    with pytest.raises(ValueError, match="was chosen on 12 of the 12 topics of these prompts"):
        faithfulness(model, task("train"), chosen, progress=False)
    with pytest.raises(ValueError, match="a model with 2 layers of 4 heads, tiny llama has 3"):
        faithfulness(tiny.hooked(), task(), chosen, progress=False)
    with pytest.raises(ValueError, match="ablation 'some': choose one of mean, zero"):
        Ablation(model, task(), "some")
    for stages, said in (
        ([], "no stages were given"),
        ([Stage("a", 0)], "stage 'a' with k=0"),
        ([Stage("a", 1, "b")], "receives at 'b', which no stage before it makes"),
        ([Stage("a", 1, sign="most")], "has part='q' and sign='most'"),
    ):
        with pytest.raises(ValueError, match=said):
            discover(model, task("train"), stages, progress=False)
    with pytest.raises(ValueError, match="the ranking has 0 heads"):
        faithfulness_curve(model, task(), [], progress=False)
    with pytest.raises(ValueError, match="sizes 1 to 3 were asked of 1 ranked heads"):
        faithfulness_curve(model, task(), [Site.parse(COPY)], [1, 3], progress=False)
