"""Do safe and unsafe prompts form two clusters inside a model: the Alignment Quality Index, checked.

After arXiv 2506.13901: a weighted mean over layers, its weights learned to part the classes, and
cluster indices of the result. What the paper leaves open is ours and said where it is: the loss
and pooling (`pooling`), topics that never straddle the split, indices without what chance adds
(`between_topics`), a null that learns its weights again from shuffled labels, equal weights beside
learned ones, and the same numbers from the words and lengths of the texts alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from analyses.drift import text_baselines
from analyses.drift.aqi_design import Design, check, design, notes
from analyses.drift.aqi_reading import INDICES, Reading, read
from analyses.drift.aqi_result import AQI, TEXTS
from analyses.drift.clusters import one_statistic
from analyses.drift.pooling import Normaliser, Pooling, fit_pooling, pooled, scaled, uniform
from probes.capturing import capture
from probes.contrast import Contrast
from probes.model import HookedModel
from probes.results import Record
from probes.scores import bca
from probes.splits import warn_if_few


def measure_aqi(
    activations: Mapping[str, Mapping[str, Tensor]],
    labels: Bool[Tensor, " prompt"],
    topics: Sequence[str],
    *,
    train: Int[Tensor, " train"],
    test: Int[Tensor, " test"],
    reference: str | None = None,
    strata: Sequence[str] | None = None,
    texts: Sequence[str] | None = None,
    normaliser: Normaliser = "softmax",
    steps: int = 500,
    seeds: int = 5,
    permutations: int = 200,
    resamples: int = 2000,
    seed: int = 0,
) -> AQI:
    """Indices of each checkpoint from its activations `{checkpoint: {site: [prompt, d_model]}}`.

    All checkpoints have read the same prompts, at the same sites. Layer weights, scales and probe
    come from the rows `train`, figures from `test`; no topic may be in both. `reference` is the
    first checkpoint unless said. Half precision is widened first. The weights of a shuffle are
    learned exactly as the real ones are, with the same steps, seeds and minibatches.
    """
    reference = check(activations, labels, topics, train, test, reference)
    if strata is not None and len(strata) != len(labels):
        raise ValueError(f"{len(labels)} prompts with {len(strata)} strata: give one for each")
    if texts is not None and len(texts) != len(labels):
        raise ValueError(f"{len(labels)} prompts with {len(texts)} texts: give one for each")
    if permutations < 20:
        raise ValueError(
            f"{permutations} permutations were asked: ask for at least 20 to have a 95th "
            "percentile, and for 200 to publish it"
        )
    tested = [topics[i] for i in map(int, test)]
    warn_if_few(tested)
    plan = design(
        *(labels, topics, train, test, strata),
        permutations=permutations,
        resamples=resamples,
        seed=seed,
    )
    names = [topics[i] for i in map(int, train)]
    columns = torch.cat([plan.train_labels[:, None], plan.train_shuffled], 1)
    readings: dict[tuple[str, str], Reading] = {}
    alphas = []
    for model, sites in activations.items():
        rows = torch.stack([x.float() for x in sites.values()], 1)
        fitted = fit_pooling(
            *(rows[train], columns, names),
            normaliser=normaliser,
            steps=steps,
            seeds=seeds,
            seed=seed,
        )
        alphas.append(fitted.alpha[0])
        for pooling, found in _of_model(rows, train, test, fitted, plan).items():
            readings[model, pooling] = found
    if texts is not None:
        for pooling, x in (
            ("words", text_baselines.words(texts, train)),
            ("length", text_baselines.lengths(texts, train)),
        ):
            if bool((x[train] != x[train][0]).any()):  # texts of one length part nothing
                readings[TEXTS, pooling] = read(x[train], x[test], plan)
    first = activations[reference]
    same = tuple(
        model
        for model, sites in activations.items()
        if model != reference and all(torch.equal(x, first[s]) for s, x in sites.items())
    )
    return _result(readings, alphas, plan, reference, same, tuple(first), len(set(names)))


def lineage_aqi(
    models: Sequence[HookedModel],
    train: Contrast,
    test: Contrast,
    *,
    part: str = "resid_post",
    train_answers: Sequence[str] | None = None,
    test_answers: Sequence[str] | None = None,
    batch_size: int = 32,
    steps: int = 500,
    seeds: int = 5,
    permutations: int = 200,
    resamples: int = 2000,
    normaliser: Normaliser = "softmax",
    seed: int = 0,
    progress: bool = True,
) -> AQI:
    """Read two contrasts with each checkpoint at every layer and measure; the first model is the
    reference.

    `part` is `resid_post` or `mlp_out` (the paper's). Read is the last token of the prompt or,
    with answers (completions, one a prompt, the same for all checkpoints), the mean over the
    answer's tokens. The prompt alone says nothing of how a model decodes. Models of one lineage
    should share a template: take them from `analyses.checkpoints`.
    """
    if not models:
        raise ValueError("no model was given: give at least one")
    labels = [model.label for model in models]
    if len(set(labels)) < len(labels):
        raise ValueError(f"two models are called alike ({', '.join(labels)}): set their labels")
    if (train_answers is None) != (test_answers is None):
        raise ValueError("answers were given for one part only: give them for both or for none")
    prompts = (*train.prompts, *test.prompts)
    answers = None
    if train_answers is not None and test_answers is not None:
        answers = (*train_answers, *test_answers)
    where = "last" if answers is None else "mean:generated"
    found: dict[str, dict[str, Tensor]] = {}
    records = []
    for model, label in zip(models, labels, strict=True):
        acts = capture(
            *(model, prompts, f"all.{part}", where),
            answers=answers,
            batch_size=batch_size,
            progress=progress,
        )
        found[label] = {str(site): acts[site] for site in acts.sites}
        records.append(acts.record)
    strata = None
    if train.strata is not None and test.strata is not None:
        strata = (*train.strata, *test.strata)
    texts = [text_baselines.text_of(prompt) for prompt in prompts]
    if answers is not None:
        texts = [f"{text}\n{answer}" for text, answer in zip(texts, answers, strict=True)]
    n = len(train)
    result = measure_aqi(
        *(found, torch.cat([train.positive, test.positive]), (*train.topics, *test.topics)),
        train=torch.arange(n),
        test=torch.arange(n, len(prompts)),
        strata=strata,
        texts=texts,
        normaliser=normaliser,
        steps=steps,
        seeds=seeds,
        permutations=permutations,
        resamples=resamples,
        seed=seed,
    )
    settings = {
        **{"part": part, "positions": where, "normaliser": normaliser, "steps": steps},
        **{"permutations": permutations, "resamples": resamples, "train": train.name},
        "test": test.name,
    }
    record = Record(
        models=tuple(name for r in records for name in r.models),
        fingerprints=tuple(print_ for r in records for print_ in r.fingerprints),
        template_hash=records[0].template_hash,
        prompts_hash=records[0].prompts_hash,
        seeds=tuple(range(seed, seed + seeds + 1)),
        dtype=records[0].dtype,
        engine=records[0].engine,
        settings=settings,
    )
    return replace(result, record=record)


def _of_model(
    rows: Float[Tensor, "prompt layer d_model"],
    train: Tensor,
    test: Tensor,
    fitted: Pooling,
    plan: Design,
) -> dict[str, Reading]:
    rows = scaled(rows, fitted.scale)
    parts = rows[train], rows[test]
    alpha = fitted.alpha.mean(1)  # over seeds: still on the simplex

    def under(fit: int) -> tuple[Tensor, Tensor]:
        return pooled(parts[0], alpha[fit]), pooled(parts[1], alpha[fit])

    equal = uniform(rows.shape[1])
    return {
        "learned": read(*under(0), plan, lambda shuffle: under(1 + shuffle)),
        "uniform": read(pooled(parts[0], equal), pooled(parts[1], equal), plan),
    }


def _result(
    readings: dict[tuple[str, str], Reading],
    alphas: list[Tensor],
    plan: Design,
    reference: str,
    identical: tuple[str, ...],
    sites: tuple[str, ...],
    n_train_topics: int,
) -> AQI:
    changes = [
        _change(found, readings.get((reference, pooling)), plan.seed)
        for (_, pooling), found in readings.items()
    ]
    change, low, high, null = torch.tensor(changes).float().unbind(1)
    found = list(readings.values())
    axioms = torch.stack([r.axioms for r in found]).float()
    n_topics = len(set(plan.test_topics))
    return AQI(
        models=tuple(m for m, pooling in readings if pooling == "learned"),
        reference=reference,
        identical=identical,
        sites=sites,
        readings=tuple(readings),
        indices=INDICES,
        value=torch.stack([r.value for r in found]).float(),
        estimate=torch.stack([r.estimate for r in found]).float(),
        low=torch.stack([r.low for r in found]).float(),
        high=torch.stack([r.high for r in found]).float(),
        null=torch.stack([r.null for r in found]).float(),
        change=change,
        change_low=low,
        change_high=high,
        change_null=null,
        alpha=torch.stack(alphas),
        axioms=tuple(a.name for a in plan.axioms),
        axiom_topics=tuple(a.topics for a in plan.axioms),
        axiom_ratio=axioms[:, :, 0].contiguous(),
        axiom_low=axioms[:, :, 1].contiguous(),
        axiom_high=axioms[:, :, 2].contiguous(),
        axiom_null=axioms[:, :, 3].contiguous(),
        axiom_xie_beni=axioms[:, :, 4].contiguous(),
        axiom_calinski_harabasz=axioms[:, :, 5].contiguous(),
        projection=torch.stack([r.projection for r in found]).float(),
        positive=plan.test_labels,
        top_share=torch.tensor([r.top_share for r in found]),
        n_topics=n_topics,
        n_train_topics=n_train_topics,
        identity=tuple(one_statistic(r.scatter) for r in found),
        notes=notes(plan, n_topics, one_statistic(found[0].scatter)),
    )


def _change(found: Reading, origin: Reading | None, seed: int) -> tuple[float, ...]:
    """Difference of F in units of each one's own null, its limits, and what shuffles reach.

    The null is drawn again with every resample, because its percentile is known as well as 200
    shuffles let it be.
    """
    if origin is None:  # the texts are no checkpoint
        return (float("nan"),) * 4
    generator = torch.Generator().manual_seed(seed)
    size = len(found.null)
    again = torch.randint(size, (len(found.drawn), size), generator=generator)

    def relative(r: Reading) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        null = r.null[:, 0]
        reached = null.quantile(0.95).clamp(min=1e-12)
        drawn = null[again].quantile(0.95, dim=1).clamp(min=1e-12)
        return r.estimate[0] / reached, r.drawn / drawn, r.left / reached, null / reached

    one, other = relative(found), relative(origin)
    value, drawn, left, null = (a - b for a, b in zip(one, other, strict=True))
    limits = bca(value, drawn, left)
    return float(value), float(limits.low), float(limits.high), float(null.abs().quantile(0.95))
