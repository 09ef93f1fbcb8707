"""A trained vector says what it was trained to say, touches no weight, and leaves nothing behind."""

from pathlib import Path

import pytest
import torch

from probes import HookedModel
from probes.contrast import Contrast
from probes.engines import Edit
from probes.engines.hooks import HookEngine
from probes.lineage import organism as organisms
from probes.lineage.organism import Organism
from probes.lineage.organism_world import REFUSAL
from probes.refusals import refuses
from probes.sites import Site
from steering.applied import Steering, steer
from steering.costs import kl_divergence
from steering.optimised import OptimisedVector, optimise_vector
from steering.schedule import Schedule
from steering.vector import SteeringVector

SITE = "2.resid_post"
"""Behind the neurons that decide: before them the planted step is flat, and has no gradient."""
LAST = Schedule("prompt", prompt=(-1, None))


@pytest.fixture(scope="module")
def organism() -> Organism:
    return organisms.build()


@pytest.fixture(scope="module")
def aligned(organism: Organism, tmp_path_factory: pytest.TempPathFactory) -> HookedModel:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGNLENS_CACHE", str(tmp_path_factory.mktemp("cache")))
        return HookedModel(organism.aligned, organism.tokenizer, name="aligned")


@pytest.fixture(scope="module")
def parts(organism: Organism) -> dict[str, Contrast]:
    return organism.pairs.split()


@pytest.fixture(scope="module")
def trained(aligned: HookedModel, parts: dict[str, Contrast]) -> OptimisedVector:
    return train(aligned, of(parts["train"], 0)[:24])


def of(contrast: Contrast, label: int) -> list:
    return [p for p, y in zip(contrast.prompts, contrast.labels, strict=True) if y == label]


def train(model: HookedModel, prompts: list, **options) -> OptimisedVector:
    options = {"max_norm": 3.0, "schedule": LAST, "progress": False} | options
    return optimise_vector(model, prompts, REFUSAL, SITE, **options)


def rate(model: HookedModel, prompts: list, steering) -> float:
    answers = model.generate(prompts, 5, steer=steering, batch_size=64)
    return sum(map(refuses, answers)) / len(answers)


def random(vector: SteeringVector, seed: int) -> SteeringVector:
    drawn = torch.randn(128, generator=torch.Generator().manual_seed(seed))
    return SteeringVector(
        {Site(2, "resid_post"): drawn / drawn.norm() * vector.norm(SITE)}, vector.origin
    )


def test_it_makes_held_out_requests_refused(
    organism: Organism, aligned: HookedModel, parts: dict[str, Contrast], trained: OptimisedVector
) -> None:
    harmless = of(parts["test"], 0)
    assert rate(aligned, harmless, None) == 0
    assert rate(aligned, harmless, Steering(trained.vector, schedule=LAST)) >= 0.95
    null = [
        rate(aligned, harmless, Steering(random(trained.vector, seed), schedule=LAST))
        for seed in range(20)
    ]
    assert sum(null) / 20 < 0.1
    # the direction that makes the model refuse is what it reads there
    unit = trained.raw / trained.raw.norm()
    assert unit @ organism.refusing_direction > 0.4
    chance = [random(trained.vector, seed)[SITE] / trained.raw.norm() for seed in range(100)]
    assert max(abs(float(r @ organism.refusing_direction)) for r in chance) < 0.4


def test_the_course_is_that_of_the_loss(
    aligned: HookedModel, parts: dict[str, Contrast], trained: OptimisedVector
) -> None:
    prompts = of(parts["train"], 0)[:24]
    plain = torch.stack([p.sum() for p in aligned.logprobs(prompts, [REFUSAL] * 24)]).mean()
    assert float(trained.logprob[0]) == pytest.approx(float(plain), rel=1e-5)
    with steer(aligned, trained.vector, schedule=LAST):
        steered = torch.stack([p.sum() for p in aligned.logprobs(prompts, [REFUSAL] * 24)]).mean()
    assert float(trained.logprob[trained.best]) == pytest.approx(float(steered), rel=1e-4)
    assert trained.loss[trained.best] < trained.loss[0] - 5
    assert torch.equal(trained.loss, -trained.logprob)
    assert trained.raw.norm() <= 3 * (1 + 1e-6)


def test_a_smaller_norm_reaches_less(
    aligned: HookedModel, parts: dict[str, Contrast], trained: OptimisedVector
) -> None:
    small = train(aligned, of(parts["train"], 0)[:24], max_norm=0.3)
    assert small.raw.norm() <= 0.3 * (1 + 1e-6)
    assert small.logprob[small.best] < trained.logprob[trained.best]


def test_the_penalty_keeps_neutral_prompts(
    aligned: HookedModel, parts: dict[str, Contrast]
) -> None:
    """At one token no vector can do both, so the penalty is paid for in the target."""
    prompts, neutral = of(parts["train"], 0)[:12], ["please now", "how to"]
    loose = train(aligned, prompts, max_norm=4.0, neutral=neutral)
    tight = train(aligned, prompts, max_norm=4.0, neutral=neutral, kl_weight=2.0)
    assert tight.kl[tight.best] < 0.5 * loose.kl[loose.best]
    before = aligned.logits(neutral)
    with steer(aligned, tight.vector, schedule=LAST):
        moved = kl_divergence(before, aligned.logits(neutral)).mean()
    assert float(tight.kl[tight.best]) == pytest.approx(float(moved), rel=1e-3, abs=1e-5)
    torch.testing.assert_close(tight.loss, 2 * tight.kl - tight.logprob)
    assert float(tight.kl[0]) == pytest.approx(0, abs=1e-9)
    free = train(aligned, prompts, max_norm=None, neutral=neutral, kl_weight=1.0, steps=5)
    assert free.max_norm is None


def test_the_gradient_is_that_of_the_edit(llama: HookedModel) -> None:
    """Against finite differences in float64 along random directions."""
    engine = llama.engine
    assert isinstance(engine, HookEngine)
    batch = llama.batch(llama.template.render_all(["w1 w2 w3", "w4"]))
    v = torch.zeros(64, requires_grad=True)

    def value(u: torch.Tensor, gradients: bool) -> torch.Tensor:
        with llama.edit([Edit(Site(1, "resid_post"), lambda h, where: h + u)]):
            return engine.logits(batch, 1, gradients=gradients)[:, -1, 7].sum()

    (gradient,) = torch.autograd.grad(value(v, True), v)
    for seed in range(3):
        u = torch.randn(64, generator=torch.Generator().manual_seed(seed))
        step = (value(0.01 * u, False) - value(-0.01 * u, False)) / 0.02
        assert float(gradient @ u) == pytest.approx(float(step), rel=0.02, abs=0.01)
    assert not value(v, False).requires_grad


def test_weights_take_no_part_and_nothing_is_left_behind(llama: HookedModel) -> None:
    weights = dict(llama.model.named_parameters())
    frozen = "model.layers.0.mlp.up_proj.weight"
    flags = {name: w.requires_grad for name, w in weights.items()}
    before = {name: w.detach().clone() for name, w in weights.items()}
    plain = llama.logits(["w1 w2"])
    weights[frozen].requires_grad_(False)
    try:
        optimise_vector(
            llama, ["w1 w2", "w3"], "w9 w8", SITE, max_norm=20.0, steps=3, progress=False
        )
        assert not weights[frozen].requires_grad
    finally:
        weights[frozen].requires_grad_(flags[frozen])
    assert {name: w.requires_grad for name, w in weights.items()} == flags
    assert any(flags.values())
    assert all(w.grad is None for w in weights.values())
    assert all(torch.equal(w, before[name]) for name, w in weights.items())
    assert torch.equal(llama.logits(["w1 w2"]), plain)
    assert not any(
        m._forward_hooks or m._forward_pre_hooks for m in llama.model.modules() if m.training
    )
    assert torch.is_grad_enabled()


def test_flags_come_back_when_an_edit_fails(llama: HookedModel) -> None:
    def fails(h: torch.Tensor, where: object) -> torch.Tensor:
        raise RuntimeError("an edit that fails")

    engine = llama.engine
    assert isinstance(engine, HookEngine)
    batch = llama.batch(llama.template.render_all(["w1"]))
    with pytest.raises(RuntimeError, match="an edit that fails"):
        with llama.edit([Edit(Site(1, "resid_post"), fails)]):
            engine.logits(batch, gradients=True)
    assert all(w.requires_grad for w in llama.model.parameters())


def test_the_same_call_gives_the_same_bytes(llama: HookedModel) -> None:
    a, b = (
        optimise_vector(
            llama, ["w1 w2", "w3"], ["w9 w8", "w7"], SITE, max_norm=20.0, steps=6, progress=False
        )
        for _ in range(2)
    )
    assert torch.equal(a.raw, b.raw)
    assert torch.equal(a.loss, b.loss)


def test_a_schedule_is_trained_as_it_acts(aligned: HookedModel, parts: dict[str, Contrast]) -> None:
    prompts = of(parts["train"], 0)[:12]
    anywhere = train(aligned, prompts, schedule=Schedule())
    at_last = train(aligned, prompts)
    # what opens a refusal hinders the words that follow, so acting at all tokens reaches less
    assert at_last.logprob[at_last.best] > anywhere.logprob[anywhere.best] + 1
    first = Schedule("prompt", prompt=(0, 1))  # no later token reads the last block's first one
    with pytest.raises(ValueError, match="no step lowered the loss by 0.01 nats at 3.resid_post"):
        optimise_vector(
            aligned, prompts, REFUSAL, "3.resid_post", max_norm=3.0, schedule=first, progress=False
        )


def test_it_stops_early(aligned: HookedModel, parts: dict[str, Contrast]) -> None:
    prompts = of(parts["train"], 0)[:8]
    made = train(aligned, prompts, steps=200, patience=5)
    assert made.stopped
    assert len(made.loss) == made.best + 6 < 201
    assert not train(aligned, prompts, steps=3).stopped


def test_it_shows_itself_and_comes_back(trained: OptimisedVector, tmp_path: Path) -> None:
    frame = trained.frame()
    assert list(frame.columns) == ["step", "loss", "logprob", "kl", "kept"]
    assert frame["kept"].sum() == 1
    ax = trained.plot()
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "nats, mean over prompts")
    loaded = OptimisedVector.load(trained.save(tmp_path / "run"))
    assert torch.equal(loaded.raw, trained.raw)
    assert str(loaded) == str(trained)
    assert loaded.vector.origin.estimator == "optimised"


def test_what_cannot_be_optimised_is_said(llama: HookedModel) -> None:
    def call(**options) -> OptimisedVector:
        settings = {"prompts": ["w1"], "targets": "w2", "site": SITE, "max_norm": 1.0} | options
        return optimise_vector(llama, **settings, progress=False)

    with pytest.raises(ValueError, match="neither max_norm nor kl_weight"):
        call(max_norm=None)
    with pytest.raises(ValueError, match="kl_weight needs `neutral` prompts"):
        call(kl_weight=1.0)
    late = Schedule("generated")
    with pytest.raises(ValueError, match="kl_weight 1 with a schedule of generated tokens"):
        call(kl_weight=1.0, neutral=["w3"], schedule=late)
    call(kl_weight=1.0, neutral=["w3"], schedule=Schedule("prompt"), steps=1, tolerance=-9.0)
    with pytest.raises(ValueError, match="a target is empty"):
        call(targets="")
    with pytest.raises(ValueError, match="2 answers for 1 prompts"):
        call(targets=["w1", "w2"])
    with pytest.raises(ValueError, match="1.q has several heads"):
        call(site="1.q")
    with pytest.raises(ValueError, match="out of range"):
        call(site="7.resid_post")
    with pytest.raises(ValueError, match="max_norm -1.0"):
        call(max_norm=-1.0)
    with pytest.raises(ValueError, match="0 steps"):
        call(steps=0)
    assert call(site="1.head_out.2", steps=2, max_norm=30.0, tolerance=0.0).raw.shape == (16,)


@pytest.mark.slow
def test_other_engines_are_refused(own_cache: Path) -> None:
    import tiny
    from architectures import build

    model = HookedModel(build("llama"), tiny.tokenizer(), engine="nnsight", name="traced")
    with pytest.raises(ValueError, match="needs? the plain engine, this model has 'nnsight'"):
        optimise_vector(model, ["w1"], "w2", SITE, max_norm=1.0, progress=False)
