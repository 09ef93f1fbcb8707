"""Exports in the real vLLM with vllm-lens, offline and over HTTP. Needs `make serve-vllm`."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from probes import HookedModel, datasets
from probes.servers import serving
from probes.sites import Site
from steering import Origin, Schedule, Steering, SteeringVector
from steering.export.checkpoint import bake
from steering.export.client import VllmServer, chat, check, complete
from steering.export.proving import prompts_for
from steering.export.replays import Replay, gap, reference
from steering.export.unsteered import plain_folder
from steering.export.verdict import judge, verify
from steering.export.vllm_lens import decode, encode, to_vllm_lens
from steering.export.vllm_offline import VllmOffline, vllm_python

pytestmark = [pytest.mark.serving, pytest.mark.timeout(1200)]


def vector(base: HookedModel, layer: int, width: int | None = None) -> SteeringVector:
    v = torch.randn(width or base.d_model, generator=torch.Generator().manual_seed(layer))
    return SteeringVector({Site(layer, "resid_post"): v / v.norm()}, Origin.of(base))


def narrow(entry: dict[str, Any], width: int) -> dict[str, Any]:
    """The same vector cut to another width, as another model's would be."""
    return {**entry, "activations": encode(decode(entry["activations"])[:, :width].contiguous())}


def at_positions(entry: dict[str, Any], n: int) -> dict[str, Any]:
    """The same vector at the first n tokens only, those of a prompt."""
    rows = decode(entry["activations"])[:, None].expand(-1, n, -1).contiguous()
    return {**entry, "activations": encode(rows), "position_indices": list(range(n))}


def test_logits_equal_our_own_edit_and_a_wrong_width_is_not_applied(base: HookedModel) -> None:
    """One engine: unsteered, blocks first to last, a vector of another width, unsteered again."""
    steerings = [
        Steering(vector(base, layer), strength)
        for layer, strength in ((0, 4.0), (1, 30.0), (15, 4.0), (15, 30.0), (29, 30.0))
    ]
    entries = [[to_vllm_lens(s.what, s.strength)] for s in steerings]
    wrong = [narrow(entries[3][0], 100)]
    prompts = sorted(prompts_for(base, 2), key=len)
    only = [at_positions(entries[3][0], len(prompts[0]))]
    program = VllmOffline(plain_folder(base), [])
    plain, *steered, ignored, prompt_only, again = program.runs(
        prompts, 2, [[], *entries, wrong, only, []]
    )

    def verdict(meant: Steering, answers: list[Replay]) -> Any:
        return judge(base, meant, plain, answers, consumer="vLLM", target="vllm-lens")

    for meant, answers in zip(steerings, steered, strict=True):
        found = verdict(meant, answers)
        assert found.outcome == "equal", str(found)
        assert found.gaps["as it was made"] <= 1e-4 < found.effect / 100
    assert verdict(steerings[3], ignored).outcome == "not applied"
    # a vector for the prompt's positions acts at generated tokens as well: on a CPU vllm-lens does
    # not know their positions and counts each as the first; so positions are never exported
    meant = replace(steerings[3], schedule=Schedule("prompt"))
    assert verdict(meant, prompt_only[:1]).outcome == "different"
    assert verdict(steerings[3], prompt_only[:1]).outcome == "equal"
    assert gap(again, reference(base, (), again)).largest <= 1e-4


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_a_prefix_cache_hands_steered_keys_to_unsteered_requests(
    prefix_caching: bool, base: HookedModel
) -> None:
    """What `serve-args` prevents: a plain request after a steered one with the same prompt."""
    text = " ".join(datasets.paragraphs())
    prompt = tuple(base.tokenizer(text)["input_ids"][:300])
    entry = to_vllm_lens(vector(base, 5), 60.0)
    program = VllmOffline(plain_folder(base), [], prefix_caching=prefix_caching)
    _, plain = program.runs([prompt], 1, [[entry], []])
    found = gap(plain, reference(base, (), plain)).largest
    assert found > 0.5 if prefix_caching else found <= 1e-3


@pytest.fixture(scope="module")
def server(base: HookedModel) -> Iterator[str]:
    """vLLM's OpenAI-compatible server with the arguments of `serve-args`."""
    line = [
        str(vllm_python()), "-m", "vllm.entrypoints.openai.api_server", "--model",
        str(plain_folder(base)), "--served-model-name", "smol", "--dtype", "float32",
        "--max-model-len", "512", "--max-num-seqs", "4", "--no-enable-prefix-caching",
        "--enforce-eager",
    ]  # fmt: skip
    environment = {
        **os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_USE_V2_MODEL_RUNNER": "0",
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    with serving(line, environment=environment) as address:
        yield address


def test_one_steered_request_over_http(server: str, base: HookedModel) -> None:
    meant = Steering(vector(base, 15), 30.0)
    entry = to_vllm_lens(meant.what, 30.0)
    program = VllmServer(server, [entry])
    found = verify(base, meant, program, prompts_for(base, 2), 3, target="vllm-lens")
    assert found.outcome == "equal" and found.kind == "top", str(found)
    assert program.model == "smol"
    doubled = VllmServer(server, [to_vllm_lens(meant.what, 60.0)])
    twice = verify(base, meant, doubled, prompts_for(base, 1), 2, target="vllm-lens")
    assert twice.diagnosis == "twice as strong"


def test_the_health_check_is_not_taken_in_by_status_200(server: str, base: HookedModel) -> None:
    entry = to_vllm_lens(vector(base, 15), 30.0)
    prompt = prompts_for(base, 1)[0]
    assert check(server, prompt, [entry]).steered
    ignored = check(server, prompt, [narrow(entry, 100)])
    assert not ignored.steered and str(ignored).startswith("NOT STEERED")
    with pytest.raises(RuntimeError, match="500|out of range"):
        complete(server, prompt, entries=[{**entry, "layer_indices": [99]}], max_tokens=1)


def test_a_chat_request_is_steered_too(server: str, base: HookedModel) -> None:
    asked = [{"role": "user", "content": "Name three colours."}]
    entry = to_vllm_lens(vector(base, 15), 120.0)
    assert chat(server, asked, max_tokens=12) != chat(server, asked, entries=[entry], max_tokens=12)


def test_a_baked_checkpoint_runs_in_vllm(base: HookedModel, tmp_path: Path) -> None:
    what = 8.0 * vector(base, 12)
    done = bake(base, what, tmp_path / "baked")
    program = VllmOffline(done.folder, None)
    found = verify(base, Steering(what), program, prompts_for(base, 1), 2, target="checkpoint")
    assert found.outcome == "equal", str(found)
    assert found.gaps["as it was made"] <= 1e-4
