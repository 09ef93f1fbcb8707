"""The engines are independent: without the hook engine the other two work and agree."""

import subprocess
import sys
from pathlib import Path

import pytest

from probes.engines import open_engine
from probes.layout import resolve

SCRIPT = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name == {blocked!r}:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Block())
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import architectures
from probes import HookedModel, Site
from probes.engines import Batch
from probes.selfcheck import compare, plain_reads
from probes.engines.modes import eager_attention

ids = torch.randint(3, 190, (2, 9), generator=torch.Generator().manual_seed(0))
mask = torch.ones_like(ids)
mask[1, :3] = 0
batch = Batch(ids, mask)
for engine in {engines!r}:
    for name in ("llama", "gpt2", "gemma2"):
        plain = architectures.build(name)
        model = HookedModel(plain, engine=engine)
        sites = [Site(i, p) for i in range(model.n_layers) for p in ("resid_post", "head_out")]
        mine = model.engine.read(batch, sites)
        with eager_attention(plain):
            truth = plain_reads(plain, model.layout, batch, sites)
        error, where = compare(mine, truth, mask.bool())
        assert error <= 1e-5, (engine, name, error, where)
        with model.edit({{"1.resid_post": lambda h, where: h * 1.5 + 0.5 * h.roll(1, -1)}}):
            moved = model.engine.logits(batch)
        assert (moved - model.engine.logits(batch)).abs().max() > 1e-3
        assert model.engine.generate(batch, 3, [], 0).shape == (2, 3)
print("fine")
"""


def run(blocked: str, engines: tuple[str, ...]) -> subprocess.CompletedProcess:
    tests = str(Path(__file__).parent)
    script = SCRIPT.format(blocked=blocked, engines=engines, tests=tests)
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False
    )


def test_transformer_lens_needs_no_hook_engine() -> None:
    done = run("probes.engines.hooks", ("transformer_lens",))
    assert done.stdout.strip().endswith("fine"), done.stderr[-1500:]


def test_nnsight_needs_no_hook_engine(tmp_path: Path) -> None:
    done = run("probes.engines.hooks", ("nnsight",))
    assert done.stdout.strip().endswith("fine"), done.stderr[-1500:]


def test_the_block_really_blocks() -> None:
    done = run("probes.engines.hooks", ("transformers",))
    assert done.returncode and "probes.engines.hooks is blocked" in done.stderr


def test_an_unknown_engine_is_refused() -> None:
    import architectures

    model = architectures.build("llama")
    with pytest.raises(ValueError, match="unknown engine 'jax': choose one of transformers"):
        open_engine("jax", model, resolve(model))
