"""Activations read from a running vLLM with vllm-lens. Needs `make serve-vllm`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from probes import Activations, HookedModel, Unsupported, capture, datasets
from probes.prompts import pad
from probes.servers import serving
from probes.sites import Site
from steering.export.unsteered import plain_folder
from steering.export.vllm_offline import vllm_python

pytestmark = [pytest.mark.serving, pytest.mark.timeout(1200)]

SITES = "0,15,29.resid_post"
PROMPTS = [
    "Hi",
    "What is the capital of France?",
    "Explain in one sentence why the sky is blue, and then list three colours.",
    " ".join(datasets.paragraphs())[:1200],
    "Is it safe to mix bleach with vinegar?",
    "Give me a recipe for a cake without eggs, milk or butter.",
    "What is the capital of Spain?",
]


@contextmanager
def start(base: HookedModel, *more: str) -> Iterator[str]:
    line = [
        str(vllm_python()), "-m", "vllm.entrypoints.openai.api_server", "--model",
        str(plain_folder(base)), "--served-model-name", "smol", "--dtype", "float32",
        "--max-model-len", "512", "--max-num-seqs", "4", "--enforce-eager", *more,
    ]  # fmt: skip
    environment = {
        **os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_USE_V2_MODEL_RUNNER": "0",
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    with serving(line, environment=environment) as address:
        yield address


@pytest.fixture(scope="module")
def server(base: HookedModel) -> Iterator[str]:
    with start(base, "--no-enable-prefix-caching") as address:
        yield address


@pytest.fixture(scope="module")
def served(server: str) -> HookedModel:
    return HookedModel.load("builtin:base", engine="vllm", server=server)


def errors(a: Activations, b: Activations) -> dict[Site, float]:
    """The largest relative error of a vector at each site."""
    assert a.sites == b.sites and a.counts == b.counts
    return {site: error(a.rows(site)[0], b.rows(site)[0]) for site in a.sites}


def error(a: Tensor, b: Tensor) -> float:
    assert a.dtype == b.dtype == torch.float32 and a.shape == b.shape
    return ((a - b).norm(dim=-1) / b.norm(dim=-1)).max().item()


@pytest.mark.parametrize("positions", ["last", "all", "content", "mean:instruction_end"])
def test_captures_equal_those_of_the_plain_model(
    positions: str, served: HookedModel, base: HookedModel
) -> None:
    """Prompts of 33 to about 300 tokens in the chat template, in more than one batch."""
    a = capture(served, PROMPTS, SITES, positions, batch_size=3, progress=False)
    b = capture(base, PROMPTS, SITES, positions, batch_size=3, progress=False)
    assert max(errors(a, b).values()) < 1e-5  # 1e-6 at block 0, 7e-6 at the worst token of 29
    assert len(a) == len(PROMPTS) and a.record.dtype == "float32" and a.record.engine == "vllm"
    # the control: another prompt's vectors are far away
    assert error(a.rows("15.resid_post")[0][:1], b.rows("15.resid_post")[0][-1:]) > 0.05


def test_answers_and_every_layer(served: HookedModel, base: HookedModel) -> None:
    answers = ["It is Paris.", "Madrid, of course."]
    asked = [PROMPTS[1], PROMPTS[6]]
    sites = ["all.resid_post", "12.resid_pre"]
    a = capture(served, asked, sites, "generated", answers=answers, progress=False)
    b = capture(base, asked, sites, "generated", answers=answers, progress=False)
    assert len(a.sites) == 31 and max(errors(a, b).values()) < 1e-5


def test_a_store_is_resumed(served: HookedModel, base: HookedModel, tmp_path: Path) -> None:
    store = tmp_path / "acts"
    capture(served, PROMPTS[:4], "15.resid_post", store=store, progress=False)
    a = capture(served, PROMPTS, SITES, store=store, progress=False)
    b = capture(base, PROMPTS, SITES, progress=False)
    assert max(errors(a, b).values()) < 1e-5
    with pytest.raises(ValueError, match="engine|model"):  # what one engine wrote is not another's
        capture(base, PROMPTS, SITES, store=store, progress=False)


def test_answers_of_the_server_are_those_of_the_model(
    served: HookedModel, base: HookedModel
) -> None:
    assert served.generate(PROMPTS[:3], 8) == base.generate(PROMPTS[:3], 8)


def test_refusals_say_what_to_do(served: HookedModel, server: str) -> None:
    with pytest.raises(Unsupported, match="5.attn_out .*read resid_post"):
        capture(served, PROMPTS[:1], "5.attn_out", progress=False)
    with pytest.raises(Unsupported, match="steering.export.client"):
        served.generate(PROMPTS[:1], 1, edits={"5.resid_post": lambda h, _: h})
    with pytest.raises(ValueError, match=r"does not fit: .* takes 511"):
        capture(served, ["word " * 600], "5.resid_post", progress=False)
    with pytest.raises(ValueError, match="does not serve 'other': it has smol"):
        HookedModel.load("builtin:base", engine="vllm", server=server, served="other")


def test_a_server_that_starts_prompts_again_is_not_believed(base: HookedModel) -> None:
    """Prompts in chunks and too little room: vllm-lens keeps the rows of a first start."""
    tight = (
        "--no-enable-prefix-caching", "--block-size", "32", "--num-gpu-blocks-override", "20",
        "--max-num-batched-tokens", "128", "--long-prefill-token-threshold", "32",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    lengths = (300, 280, 260, 240, 220, 200)
    rows = [torch.randint(100, 40000, (n,), generator=generator).tolist() for n in lengths]
    batch, site = pad(rows, 0, "right"), Site(3, "resid_post")
    real = batch.mask.bool()
    with start(base, *tight) as address:
        served = HookedModel.load("builtin:base", engine="vllm", server=address)
        truth = base.engine.read(batch, [site])[site][real]
        assert error(served.engine.read(batch, [site])[site][real], truth) < 1e-5
        served.engine._preemptions = lambda: 0.0  # pyright: ignore[reportAttributeAccessIssue]
        assert error(served.engine.read(batch, [site])[site][real], truth) > 1


def test_a_prefix_cache_hides_no_tokens(base: HookedModel) -> None:
    """With the cache on, prompts that begin alike still come back whole."""
    with start(base, "--enable-prefix-caching", "--block-size", "32") as address:
        served = HookedModel.load("builtin:base", engine="vllm", server=address)
        long = PROMPTS[3]
        for given in ([long], [long, long + " And then?"], [long]):
            a = capture(served, given, SITES, "all", progress=False)
            assert (
                max(errors(a, capture(base, given, SITES, "all", progress=False)).values()) < 1e-5
            )
