"""Laws of path patching on tiny models: what must be exact, found, added up and refused."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_copying
import torch
from architectures import build
from torch import Tensor, nn

from analyses.mechanisms.path_inputs import Values
from analyses.mechanisms.path_runs import Paths
from analyses.mechanisms.paths import PathMap, PathPatched, path_map, path_patch
from analyses.mechanisms.task import Task
from analyses.patching.metrics import LogitDifference
from analyses.patching.patcher import Cell, Patcher
from analyses.patching.sources import From, Resampled, Zero
from probes import HookedModel
from probes.sites import Site

ENGINES = ("transformers", "transformer_lens", "nnsight")
CLEAN = [f"w{k} w{k + 1} w5 w6" + " w9" * (k % 3) for k in range(0, 16, 2)]
CORRUPT = [f"w{k} w{k + 70} w5 w7" + " w8" * (k % 3) for k in range(0, 16, 2)]


def task(clean: list[str] = CLEAN, corrupt: list[str] = CORRUPT, **more: Any) -> Task:
    n = len(clean)
    answers, others = (30,) * n, (31,) * n
    return Task(
        "words", tuple(clean), tuple(corrupt), "a word", answers, others,
        tuple(map(str, range(n))), LogitDifference(answers, others), True, **more,
    )  # fmt: skip


def hooked(model: Any, **options: Any) -> HookedModel:
    return HookedModel(model, tiny.tokenizer(), **options)


def paths_of(model: HookedModel, receivers: Any = (), source: Any = None, **more: Any) -> Paths:
    own = task()
    shorten = more.pop("shorten", True)
    given = From(prompts=own.counterfactuals) if source is None else source
    patcher = Patcher(model, own.prompts, given, shorten=shorten)
    chosen = patcher.checked(receivers) if receivers else ()
    return Paths(patcher, chosen, **more)


def error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


# where the outputs of heads and their inputs are: (projection that reads them, part -> (module,
# first feature)); heads are 16 or 24 wide
Modules = list[tuple[nn.Module, dict[str, tuple[nn.Module, int]]]]


def separate(model: Any) -> Modules:
    return [
        (a.o_proj, {"q": (a.q_proj, 0), "k": (a.k_proj, 0), "v": (a.v_proj, 0)})
        for a in (block.self_attn for block in model.model.layers)
    ]


def fused(model: Any) -> Modules:
    return [
        (a.c_proj, {"q": (a.c_attn, 0), "k": (a.c_attn, 64), "v": (a.c_attn, 128)})
        for a in (block.attn for block in model.transformer.h)
    ]


def by_hand(
    model: Any,
    modules: Modules,
    width: int,
    clean: Tensor,
    corrupt: Tensor,
    sender: tuple[int, int],
    receivers: list[tuple[int, str, int]],
) -> Tensor:
    """Path patching by plain hooks on one prompt after another, whole passes, everything held."""

    def run(ids: Tensor, hooks: list[tuple[nn.Module, str, Callable]]) -> Tensor:
        with ExitStack() as stack:
            for module, side, hook in hooks:
                if side == "in":
                    handle = module.register_forward_pre_hook(hook)
                else:
                    handle = module.register_forward_hook(hook)
                stack.callback(handle.remove)
            return model(ids).logits[0, -1]

    def outputs(ids: Tensor) -> list[Tensor]:
        seen: list[Tensor] = []
        keep = [(m, "in", lambda _m, a: seen.append(a[0].clone())) for m, _ in modules]
        run(ids, keep)
        return seen

    own, other = outputs(clean), outputs(corrupt)
    layer, head = sender
    own[layer][..., head * width : (head + 1) * width] = other[layer][
        ..., head * width : (head + 1) * width
    ]
    held = [(m, "in", lambda _m, _a, z=z: (z,)) for (m, _), z in zip(modules, own, strict=True)]
    noted: dict[tuple[int, str, int], Tensor] = {}

    def note(which: tuple[int, str, int], start: int) -> Callable:
        def hook(_m: nn.Module, _a: Any, out: Tensor) -> None:
            noted[which] = out[..., start : start + width].clone()

        return hook

    def put(which: tuple[int, str, int], start: int) -> Callable:
        def hook(_m: nn.Module, _a: Any, out: Tensor) -> Tensor:
            new = out.clone()
            new[..., start : start + width] = noted[which]
            return new

        return hook

    places = {}
    for which in receivers:
        module, base = modules[which[0]][1][which[1]]
        places[which] = (module, base + which[2] * width)
    direct = run(clean, held + [(m, "out", note(w, s)) for w, (m, s) in places.items()])
    if not receivers:
        return direct
    return run(clean, [(m, "out", put(w, s)) for w, (m, s) in places.items()])


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_agreement_with_plain_hooks(name: str) -> None:
    plain = build(name).double()
    modules, width = (fused if name == "gpt2" else separate)(plain), 24 if name == "qwen3" else 16
    model = hooked(plain)
    for sender, receivers in (
        ((0, 1), []),
        ((1, 3), []),
        ((0, 2), [(1, "q", 1), (2, "q", 3)]),
        ((1, 0), [(2, "v", 1), (2, "k", 0)]),
    ):
        paths = paths_of(model, [Site(*r) for r in receivers])
        ours = paths.logits((Site(sender[0], "head_out", sender[1]),))
        assert paths.notes == () and paths.held.whole is False
        changed = 0.0
        for i, (a, b) in enumerate(zip(paths.patcher.ids, paths.patcher.values.ids, strict=True)):
            pair = torch.tensor([a]), torch.tensor([b])
            want = by_hand(plain, modules, width, *pair, sender, receivers)
            assert error(ours[i], want) < 1e-6
            changed = max(changed, error(ours[i], paths.patcher.target_logits[i]))
        assert changed > 1e-3


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox"])
def test_engines_and_ways_agree(name: str) -> None:
    for receivers in ((), ("1.q.1", "2.v.0", "2.k.1")):
        found = []
        for engine in ENGINES:
            model = hooked(build(name), engine=engine)
            found.append(paths_of(model, receivers).logits((Site(0, "head_out", 2),)))
        model = hooked(build(name))
        whole = paths_of(model, receivers, shorten=False)
        found.append(whole.logits((Site(0, "head_out", 2),)))
        assert whole.held.whole and not whole.patcher.runs.shared
        assert error(whole.patcher.target_logits, found[0]) > 1e-4
        assert all(error(other, found[0]) < 1e-5 for other in found[1:])


@pytest.mark.parametrize("name", ["gemma4-text", "jamba", "mistral", "qwen3-moe"])
def test_single_tokens_give_what_whole_prompts_give(name: str) -> None:
    model = hooked(build(name))
    layer = model.layout.supported("head_out")[0]
    senders = (Site(layer, "head_out", 1),)
    short, whole = paths_of(model), paths_of(model, shorten=False)
    assert error(short.logits(senders), whole.logits(senders)) < 1e-5
    assert error(short.logits(senders), short.patcher.target_logits) > 1e-4


def test_equal_runs_change_no_bit() -> None:
    model = tiny.hooked()
    itself = paths_of(model, ["2.q.1"], From(prompts=tuple(CLEAN)))
    assert torch.equal(itself.logits((Site(0, "head_out", 1),)), itself.patcher.target_logits)
    result = path_map(model, task(CLEAN, CLEAN), null=None, progress=False)
    assert result.change.flatten().tolist() == [0.0] * 12 and not result.claimed.any()
    assert str(result) == ("paths to logits: no path changes anything, every change is exactly 0")
    other = path_map(model, task(), null=None, progress=False)
    assert bool((other.change != 0).all())


def test_what_is_written_is_what_was_there() -> None:
    """The held values really go in, and with nothing changed they give the clean run's bits."""
    paths = paths_of(tiny.hooked(), shorten=False)
    paths.held.whole = True
    held = paths.held.values([Site(1, "head_out")])
    same = Values(held.clean, held.clean)
    chunk = paths.patcher.runs.chunks[0]
    rows = [(0, i) for i in chunk]
    ((runs, jobs),) = paths.held.jobs(rows, [(Site(1, "head_out", 0),)], same, 1)
    assert len(jobs[0].writes) == 2
    assert torch.equal(runs.logits(jobs), paths.patcher.target_logits[chunk])


def linear(seed: int, mlps: bool = False) -> HookedModel:
    """Three layers without norms, with uniform attention; MLPs that write nothing, or do."""
    model: Any = build("llama")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in model.model.layers:
            block.input_layernorm = block.post_attention_layernorm = nn.Identity()
            block.self_attn.q_proj.weight.zero_()
            if not mlps:
                block.mlp.down_proj.weight.zero_()
            noise = torch.randn(block.self_attn.o_proj.weight.shape, generator=generator)
            block.self_attn.o_proj.weight.add_(0.05 * noise)
        model.model.norm = nn.Identity()
    return hooked(model.double())


@pytest.mark.parametrize("mlps", [False, True])
def test_in_a_linear_model_paths_add_up_to_the_total(mlps: bool) -> None:
    model = linear(0, mlps)
    sender = (Site(0, "head_out", 1),)
    total = Patcher(model, CLEAN, From(prompts=tuple(CORRUPT)))
    clean = total.target_logits
    whole = total.logits(sender) - clean
    direct = paths_of(model).logits(sender) - clean
    through = [
        paths_of(model, [f"{layer}.v.{head}"]).logits(sender) - clean
        for layer in (1, 2)
        for head in (0, 1)
    ]
    both = error(torch.stack([direct, *through]).sum(0), whole)
    if mlps:  # the control: these multiply
        assert both > 1e-3
        return
    assert both < 1e-5
    assert all(float(t.norm()) > 1e-2 * float(whole.norm()) for t in (direct, *through))
    assert error(direct + sum(through[:2]), whole) > 1e-2  # an incomplete set


def copying_task() -> Task:
    """The copied word is one of two; the counterfactual holds another one."""
    pairs = [(k, (k + 5) % 12) for k in range(12)]
    texts = [[f"w50 {tiny_copying.word(k)} w51" for k in side] for side in zip(*pairs, strict=True)]
    answers, others = ([tiny_copying.WORDS[k] for k in side] for side in zip(*pairs, strict=True))
    made = task(*texts)
    metric = LogitDifference(tuple(answers), tuple(others))
    return Task(
        made.name, made.prompts, made.counterfactuals, made.changed, metric.answers, metric.others,
        made.topics, metric, True,
    )  # fmt: skip


def test_the_planted_head_is_found_and_no_other() -> None:
    model = hooked(tiny_copying.copying())
    found = path_map(model, copying_task(), progress=False)
    layer, head = tiny_copying.HEAD
    assert found.best()[0] == (layer, str(head))
    planted = float(found.change[layer, head])
    rest = found.change.clone()
    rest[layer, head] = 0
    assert planted < -1 and float(rest.abs().max()) < 1e-2 * abs(planted)
    assert bool(found.claimed[layer, head])
    assert float(found.share[layer, head]) == pytest.approx(1, abs=0.02)
    # what it reads stands in the values of its key-value head, and no head writes there
    below = path_map(model, copying_task(), ["1.v.1"], null=None, progress=False)
    assert float(below.change[0].abs().max()) < 1e-2 * abs(planted)
    assert below.change[1].isnan().all()


def test_positions_of_both_ends() -> None:
    """Only tokens that are both a sender's and a receiver's carry anything, row by row."""
    model = tiny.hooked()
    sender = (Site(0, "head_out", 1),)
    lengths = [len(r.ids) for r in model.template.render_all(CLEAN)]
    nowhere = paths_of(model, senders_at="tokens:0:-1")
    assert torch.equal(nowhere.logits(sender), nowhere.patcher.target_logits)
    last = tuple((n - 1,) for n in lengths)
    assert torch.equal(
        paths_of(model, senders_at=last).logits(sender), paths_of(model).logits(sender)
    )
    # one token a prompt, another in each: as when every prompt runs alone
    places = tuple((n - 2 - i % 3,) for i, n in enumerate(lengths))
    paths = paths_of(model, ["1.v.0"], senders_at=places)
    together = paths.logits(sender)
    assert paths.tokens == list(places)
    for i in range(0, len(CLEAN), 3):
        one = Patcher(model, CLEAN[i : i + 1], From(prompts=(CORRUPT[i],)), shorten=False)
        alone = Paths(one, one.checked("1.v.0"), senders_at=(places[i],))
        assert error(together[i], alone.logits(sender)[0]) < 1e-5
        assert error(together[i], paths.patcher.target_logits[i]) > 1e-5
    named = task(places={"some": places})
    by_name = path_patch(
        model, named, "0.head_out.1", "1.v.0", senders_at="some", null=None, progress=False
    )
    values = task().metric(together) - task().metric(paths.patcher.target_logits)
    assert float(by_name.change[0]) == pytest.approx(float(values.mean()), rel=1e-5)


def test_given_tokens_in_a_shared_beginning_are_written_row_by_row() -> None:
    """Tokens of prompts that begin alike, patched in one prompt and not in another."""
    model = tiny.hooked()
    places = tuple(((2,) if i % 2 else (3,)) for i in range(len(CLEAN)))
    zero = Patcher(model, CLEAN, Zero())
    assert zero.settled().shared > 3
    found = zero.logits("1.head_out", "tokens:3:4")
    cell = Cell(zero.checked("1.head_out"), places)
    (mixed,) = zero.run([cell])
    assert zero.runs.shared == 2
    whole = Patcher(model, CLEAN, Zero(), shorten=False)
    assert error(mixed, whole.run([cell])[0]) < 1e-5
    assert error(mixed[0], found[0]) < 1e-5 < error(mixed[1], found[1])


def test_frozen_mlps_leave_the_straight_path() -> None:
    model = tiny.hooked()
    sender = (Site(1, "head_out", 1),)
    held, free = paths_of(model, freeze_mlps=True), paths_of(model)
    assert error(held.logits(sender), free.logits(sender)) > 1e-3
    # by hand: what the head adds to the stream, and nothing else
    plain: Any = model.model
    with torch.no_grad():
        for i in (0, 5):
            streams, heads = [], []
            for ids in (held.patcher.ids[i], held.patcher.values.ids[i]):
                batch = model.batch([model.template.render_all([CLEAN[i]])[0]])
                del batch
                sites = [Site(2, "resid_post"), Site(1, "head_out", 1)]
                from probes.engines import Batch

                row = Batch(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))
                read = model.engine.read(row, sites)
                streams.append(read[sites[0]][0, -1])
                heads.append(read[sites[1]][0, -1])
            out = plain.model.layers[1].self_attn.o_proj.weight[:, 16:32]
            stream = streams[0] + out @ (heads[1] - heads[0])
            want = plain.lm_head(plain.model.norm(stream))
            assert error(held.logits(sender)[i], want) < 1e-5


def test_a_map_goes_on_where_it_stopped(tmp_path: Path) -> None:
    model = tiny.hooked()
    whole = path_map(model, task(), ["2.q"], null=None, folder=tmp_path, progress=False)
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / "layer-001.safetensors").unlink()
    again = path_map(model, task(), ["2.q"], null=None, folder=tmp_path, progress=False)
    assert torch.equal(whole.change.nan_to_num(), again.change.nan_to_num())
    with pytest.raises(ValueError, match="holds the layers of another map"):
        path_map(model, task(), ["2.k"], null=None, folder=tmp_path, progress=False)


def test_results_say_what_they_are(tmp_path: Path) -> None:
    model = tiny.hooked()
    found = path_map(model, task(), ["2.q.0", "2.q.1"], draws=5, progress=False)
    assert len(found.null_change) == 5 and "Only 8 topics" in found.notes[0]
    again = PathMap.load(found.save(tmp_path / "map"))
    assert str(again) == str(found) and again.frame().equals(found.frame())
    assert "paths to 2.q.0, 2.q.1: layer" in str(found)
    ax = found.plot()
    assert ax.get_xlabel() == "head that sends" and len(ax.get_yticklabels()) == 2
    one = path_patch(
        model, task(), "0.head_out.1", ["1.q.0"], null="receivers", draws=4, progress=False
    )
    assert PathPatched.load(one.save(tmp_path / "one")).receivers == ("1.q.0",)
    assert len(set(one.null_change.tolist())) > 1 and one.null_kind == "other receivers"
    zeros = path_patch(
        model, task(), "0.head_out.1", source=Resampled(From()), draws=2, progress=False
    )
    assert zeros.notes[1].startswith("No null was drawn: it needs a source run")


def test_mistakes_are_said() -> None:
    model, own = tiny.hooked(), task()
    for senders, receivers, said in (
        ("2.head_out.0", ["1.q.0"], "sender 2.head_out.0 lies in or above the highest receiver's"),
        ("1.head_out.0", ["1.q.0", "2.q.0"], "receiver 1.q.0 lies in or below the lowest sender's"),
        ("1.head_out.7", "logits", "site 1.head_out.7 is out of range: layer 1 has 4 heads"),
        ("0.head_out.0", ["1.mlp_out"], "1.mlp_out cannot receive a path: name q, k or v"),
        ("0.resid_post", "logits", "0.resid_post cannot send: name heads"),
    ):
        with pytest.raises(ValueError, match=said):
            path_patch(model, own, senders, receivers, progress=False)
    with pytest.raises(ValueError, match="null='some': choose 'prompts', 'receivers' or None"):
        path_patch(model, own, "0.head_out.0", null="some", progress=False)
    with pytest.raises(ValueError, match="which has no attention heads"):
        path_map(hooked(build("mamba")), own, progress=False)
    far = tuple((99,) for _ in CLEAN)
    with pytest.raises(ValueError, match="token 99 is given for prompt 0, which has"):
        path_patch(model, own, "0.head_out.0", senders_at=far, progress=False)
    with pytest.raises(ValueError, match="token indices are given for 1 prompts"):
        path_patch(model, own, "0.head_out.0", senders_at=((1,),), progress=False)
    with pytest.raises(ValueError, match="the highest receiver's layer 0"):
        path_map(model, own, ["0.q.0"], progress=False)
