"""The Alignment Quality Index read from models, and what their texts alone tell."""

import pytest
import tiny_lineage
import torch

from analyses.drift import text_baselines
from analyses.drift.aqi import lineage_aqi
from analyses.drift.aqi_reading import INDICES
from probes import HookedModel, datasets

FEW = {"steps": 40, "seeds": 1, "permutations": 20, "resamples": 200}
MORE = {"steps": 200, "seeds": 2, "permutations": 60, "resamples": 500}


def test_word_counts_know_the_training_words_only() -> None:
    x = text_baselines.words(["a b B", "c", "b d", ""], torch.tensor([0, 1]))
    assert x.shape == (4, 3)
    assert torch.allclose(x[0], torch.tensor([1.0, 2.0, 0.0]) / 5**0.5)
    assert x[2].tolist() == [0, 1, 0] and x[3].tolist() == [0, 0, 0]
    n = text_baselines.lengths(["one two", "one", "x " * 9], torch.tensor([0, 1]))
    assert n[:2].mean(0).abs().max() < 1e-6 and n[2, 0] > n[0, 0]
    assert text_baselines.text_of([{"role": "user", "content": "hi"}]) == "hi"


def test_a_lineage_is_read_at_every_layer() -> None:
    models = [item.model for item in tiny_lineage.checkpoints().items]
    parts = tiny_lineage.pairs().split({"train": 0.5, "test": 0.5})
    result = lineage_aqi(models, parts["train"], parts["test"], progress=False, **FEW)
    assert result.models == tuple(m.label for m in models)
    assert len(result.sites) == models[0].n_layers and result.reference == models[0].label
    assert ("texts", "words") in result.readings and result.axioms == ()
    assert result.record.fingerprints[0] == models[0].fingerprint
    answered = lineage_aqi(
        models[:1],
        parts["train"],
        parts["test"],
        part="mlp_out",
        train_answers=["w1 w2"] * len(parts["train"]),
        test_answers=["w1 w2"] * len(parts["test"]),
        progress=False,
        **FEW,
    )
    assert answered.record.settings["positions"] == "mean:generated"
    assert all(site.endswith("mlp_out") for site in answered.sites)
    with pytest.raises(ValueError, match="answers were given for one part only"):
        lineage_aqi(models[:1], parts["train"], parts["test"], train_answers=["a"])
    with pytest.raises(ValueError, match="two models are called alike"):
        lineage_aqi([models[0], models[0]], parts["train"], parts["test"])
    with pytest.raises(ValueError, match="no model was given"):
        lineage_aqi([], parts["train"], parts["test"])


@pytest.mark.slow
def test_alignment_parts_the_twins_of_the_lineage() -> None:
    train, test = datasets.safety("train").limited(32), datasets.safety("test").limited(32)
    models = [HookedModel.load(f"builtin:{name}", device="cpu") for name in ("base", "aligned")]
    result = lineage_aqi(models, train, test, progress=False, **MORE)
    base, aligned = (result.row(m.label) for m in models)
    assert result.claimed[aligned, 0] and result.estimate[aligned, 0] > result.estimate[base, 0]
    assert result.low[aligned, 0] > result.high[base, 0]
    assert not result.claimed[result.row("texts", "length"), INDICES.index("AUROC")]
