"""The serving engine against a small HTTP server that answers as vLLM with vllm-lens does.

Its activations are those of the tiny model itself; each fault is one that a real server can have.
"""

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from architectures import build
from torch import Tensor

from probes import Batch, Edit, HookedModel, Site, Unsupported, capture, stream
from probes.plan import Packed, batch_of
from probes.wire import decode
from steering import Origin
from steering.export.vllm_lens import encode

PROMPTS = tiny.words(11, 3, longest=14)
NAME = "tiny"


class Server:
    """Plays the routes that the engine uses. `spoil` changes an answer before it is sent."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.names, self.max_model_len = [NAME], 64
        self.requests: list[dict[str, Any]] = []
        self.spoil: Callable[[dict[str, Any]], Any] = lambda answer: answer
        self.routes: dict[str, Callable[[dict[str, Any]], Any]] = {
            "/v1/models": lambda _: {
                "data": [{"id": n, "max_model_len": self.max_model_len} for n in self.names]
            },
            "/tokenize": lambda body: {
                "tokens": self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
            },
            "/metrics": lambda _: f'vllm:num_preemptions_total{{engine="0"}} {self.preempted}.0\n',
            "/v1/completions": self.complete,
        }
        self.preempted, self.at_once, self.most_at_once = 0, 0, 0
        self.delay = 0.0
        self.lock = threading.Lock()
        self.address = ""

    def complete(self, body: dict[str, Any]) -> Any:
        with self.lock:
            self.requests.append(body)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(self.delay)
        with self.lock:
            self.at_once -= 1
            return self.spoil({"choices": [self.choice(body)], **self.captured(body)})

    @torch.no_grad()
    def choice(self, body: dict[str, Any]) -> dict[str, Any]:
        ids, new = torch.tensor([body["prompt"]]), []
        for _ in range(body["max_tokens"] if "return_token_ids" in body else 0):
            new.append(int(self.model(ids).logits[0, -1].argmax()))
            ids = torch.cat([ids, torch.tensor([new[-1:]])], 1)
            if new[-1] in body["stop_token_ids"]:
                break
        return {"text": "", "token_ids": new}

    @torch.no_grad()
    def captured(self, body: dict[str, Any]) -> dict[str, Any]:
        asked = body.get("vllm_xargs", {}).get("output_residual_stream")
        if asked is None:
            return {}
        assert isinstance(asked, str)  # arguments of that field are scalars
        wanted, seen = json.loads(asked), {}
        blocks = self.model.model.layers
        handles = [
            block.register_forward_hook(lambda _m, _a, out, i=i: seen.update({i: out[0]}))
            for i, block in enumerate(blocks)
        ]
        try:
            self.model(torch.tensor([body["prompt"]]))
        finally:
            [handle.remove() for handle in handles]
        layers = range(len(blocks)) if wanted is True else sorted(wanted)
        rows = torch.stack([seen[i].reshape(len(body["prompt"]), -1) for i in layers])
        return {"activations": {"residual_stream": encode(rows)}}


def handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(size)) if size else {}
            route = server.routes.get(self.path)
            found = (404, {"error": "no such route"}) if route is None else route(body)
            status, said = found if isinstance(found, tuple) else (200, found)
            data = (said if isinstance(said, str) else json.dumps(said)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as files."""
    folder = tmp_path_factory.mktemp("model")
    build("llama").save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def server() -> Iterator[Server]:
    played = Server(build("llama"), tiny.tokenizer())
    listening = ThreadingHTTPServer(("127.0.0.1", 0), handler(played))
    played.address = f"http://127.0.0.1:{listening.server_address[1]}"
    thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
    thread.start()
    yield played
    listening.shutdown()
    listening.server_close()
    thread.join()


def load(folder: Path, server: Server, **options: Any) -> HookedModel:
    return HookedModel.load(str(folder), engine="vllm", server=server.address + "/", **options)


def plain(folder: Path) -> HookedModel:
    return HookedModel.load(str(folder), device="cpu")


def error(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm(dim=-1) / b.norm(dim=-1)).max().item()


@pytest.mark.parametrize("positions", ["last", "all", "content", "mean:instruction_end"])
def test_captures_equal_those_of_the_model_itself(
    positions: str, folder: Path, server: Server
) -> None:
    served, own = load(folder, server), plain(folder)
    sites = "all.resid_post"
    # a prompt of one batch of four is left over, and one prompt stands twice
    a = capture(served, [*PROMPTS, PROMPTS[0]], sites, positions, batch_size=4, progress=False)
    b = capture(own, [*PROMPTS, PROMPTS[0]], sites, positions, batch_size=4, progress=False)
    assert a.counts == b.counts and a.sites == b.sites and len(a.sites) == own.n_layers
    assert max(error(a.rows(s)[0], b.rows(s)[0]) for s in a.sites) < 1e-5
    assert a.record.engine == "vllm" and a.notes == ("the vllm engine runs every prompt whole",)
    assert len(server.requests) == 1 + len(PROMPTS)  # the check, and each prompt once


def test_the_stream_before_a_block_is_what_left_the_one_before(
    folder: Path, server: Server
) -> None:
    served, own = load(folder, server), plain(folder)
    sites = ["1.resid_pre", "0.resid_post", "2.resid_pre"]
    before = len(server.requests)
    a = capture(served, PROMPTS[:3], sites, progress=False)
    b = capture(own, PROMPTS[:3], sites, progress=False)
    assert torch.equal(a["1.resid_pre"], a["0.resid_post"])
    assert error(a["2.resid_pre"], b["2.resid_pre"]) < 1e-5
    asked = {r["vllm_xargs"]["output_residual_stream"] for r in server.requests[before:]}
    assert asked == {"[0, 1]"}  # each layer once
    with pytest.raises(Unsupported, match="0.resid_pre .*block after the first"):
        capture(served, PROMPTS[:3], "0.resid_pre", progress=False)


def test_token_ids_are_sent_and_a_padded_batch_loses_its_pads(folder: Path, server: Server) -> None:
    served = load(folder, server)
    rendered = served.template.render_all(PROMPTS)
    site = Site(1, "resid_post")
    for side in ("left", "right"):
        batch = served.batch(rendered, side)
        h = served.engine.read(batch, [site])[site]
        own = plain(folder).engine.read(batch, [site])[site]
        assert h.shape == own.shape and h.dtype == torch.float32
        assert error(h[batch.mask.bool()], own[batch.mask.bool()]) < 1e-5
        assert not h[~batch.mask.bool()].any()
    sent = {tuple(r["prompt"]) for r in server.requests[1:]}
    assert sent == {r.ids for r in rendered}
    assert all(r["max_tokens"] == 1 and r["model"] == NAME for r in server.requests)


def test_a_store_goes_on_after_a_crash(folder: Path, server: Server, tmp_path: Path) -> None:
    served = load(folder, server)

    def crash(answer: dict[str, Any]) -> Any:
        return (503, "down") if len(server.requests) > 6 else answer

    server.spoil = crash
    arguments: dict[str, Any] = {"store": tmp_path / "acts", "batch_size": 4, "progress": False}
    with pytest.raises(RuntimeError, match="answered 503: down"):
        capture(served, PROMPTS, "2.resid_post", **arguments)
    server.spoil = lambda answer: answer
    before = len(server.requests)
    a = capture(served, PROMPTS, "2.resid_post", **arguments)
    assert len(server.requests) - before == len(PROMPTS) - 4  # the first batch was kept
    b = capture(plain(folder), PROMPTS, "2.resid_post", progress=False)
    assert error(a["2.resid_post"], b["2.resid_post"]) < 1e-5


def test_as_many_requests_at_once_as_asked_for(folder: Path, server: Server) -> None:
    served = load(folder, server, concurrency=3)
    server.delay = 0.05
    list(stream(served, PROMPTS, "0.resid_post"))
    assert server.most_at_once == 3
    with pytest.raises(ValueError, match="concurrency is 0"):
        load(folder, server, concurrency=0)


def test_after_an_error_no_more_requests_are_begun(folder: Path, server: Server) -> None:
    served = load(folder, server, concurrency=1)
    server.spoil = lambda _: (500, "out of range")
    with pytest.raises(RuntimeError, match="v1/completions answered 500: out of range"):
        capture(served, PROMPTS, "0.resid_post", progress=False)
    assert len(server.requests) <= 3


def test_greedy_answers_are_those_of_the_model(folder: Path, server: Server) -> None:
    served, own = load(folder, server), plain(folder)
    assert served.generate_ids(PROMPTS[:4], 5) == own.generate_ids(PROMPTS[:4], 5)
    asked = server.requests[-1]
    assert asked["ignore_eos"] and asked["stop_token_ids"] == own._stop_ids()
    assert asked["repetition_penalty"] == 1.0 and asked["temperature"] == 0
    stop = served.generate_ids(PROMPTS[:4], 5)[0][1]
    batch = served.batch(served.template.render_all(PROMPTS[:4]))
    filled = served.engine.generate(batch, 5, [stop], 0)
    assert torch.equal(filled, own.engine.generate(batch, 5, [stop], 0))
    server.spoil = lambda answer: {"choices": [{"text": ""}]}
    with pytest.raises(RuntimeError, match="does not say the token ids.*update vLLM"):
        served.generate(PROMPTS[:1], 5)


def test_what_a_server_cannot_do_is_refused(folder: Path, server: Server) -> None:
    served = load(folder, server)
    before = len(server.requests)
    for site in ("1.attn_out", "1.resid_mid", "1.mlp_out", "1.q.0", "1.head_out", "1.pattern"):
        with pytest.raises(Unsupported, match="what leaves each block only: read resid_post"):
            served.engine.read(Batch(torch.tensor([[5]]), torch.tensor([[1]])), served.sites(site))
    with pytest.raises(Unsupported, match="steering.export.client"):
        with served.edit([Edit(Site(1, "resid_post"), lambda h, _: h)]):
            pass
    with pytest.raises(Unsupported, match="likeliest tokens"):
        served.logits(PROMPTS[:1])
    packed = batch_of([Packed.make([[5, 6], [5, 7]])], 0)
    with pytest.raises(Unsupported, match="one prompt a row"):
        served.engine.read(packed, [Site(1, "resid_post")])
    with pytest.raises(ValueError, match="a prompt of 64 tokens does not fit: .* takes 63"):
        served.engine.read(
            Batch(torch.full((1, 64), 5), torch.ones(1, 64, dtype=torch.long)),
            [Site(1, "resid_post")],
        )
    assert len(server.requests) == before
    with served.edit([]):
        pass


def test_vectors_from_a_server_fit_the_model(folder: Path, server: Server) -> None:
    served, own = load(folder, server), plain(folder)
    assert served.engine.address == server.address  # pyright: ignore[reportAttributeAccessIssue]
    Origin.of(served).check(own)
    Origin.of(own).check(served)
    assert (served.dtype, served.device) == (torch.float32, torch.device("cpu"))
    assert served.template.hash == own.template.hash
    assert served.fingerprint == f"{own.fingerprint}-{NAME}"
    assert not served.check.packs and served.label == own.label


def test_half_precision_comes_as_the_server_has_it(folder: Path, server: Server) -> None:
    def halved(answer: dict[str, Any]) -> Any:
        wire = answer["activations"]["residual_stream"]
        raw = decode(wire).bfloat16().view(torch.int16).numpy().tobytes()
        answer["activations"]["residual_stream"] = {
            "data": base64.b64encode(raw).decode(), "dtype": "int16",
            "original_dtype": "torch.bfloat16", "shape": wire["shape"],
        }  # fmt: skip
        return answer

    server.spoil = halved
    served = load(folder, server)
    assert served.dtype == torch.bfloat16
    acts = capture(served, PROMPTS, "1.resid_post", progress=False)
    assert acts["1.resid_post"].dtype == torch.bfloat16 and acts.record.dtype == "bfloat16"
    assert load(folder, server, dtype="bf16").dtype == torch.bfloat16
    with pytest.raises(ValueError, match="runs in bfloat16, asked for was torch.float16"):
        load(folder, server, dtype="float16")


def cut(*index: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Spoils an answer: only so much of its `[layer, token, width]`."""

    def spoil(answer: dict[str, Any]) -> dict[str, Any]:
        rows = decode(answer["activations"]["residual_stream"])
        answer["activations"]["residual_stream"] = encode(rows[index].contiguous())
        return answer

    return spoil


def without(answer: dict[str, Any]) -> dict[str, Any]:
    return {"choices": answer["choices"]}


def damaged(answer: dict[str, Any]) -> dict[str, Any]:
    answer["activations"]["residual_stream"]["data"] = "AAAA"
    return answer


def shapeless(answer: dict[str, Any]) -> dict[str, Any]:
    return {**answer, "activations": {"residual_stream": "binary"}}


EVERY = slice(None)
FAULTS = [
    (without, "without activations: install vllm-lens"),
    (cut(EVERY, EVERY, slice(0, 20)), "expected 2 layers of width .*runs another model"),
    (cut(slice(0, 1)), r"of shape \[1, .*expected 2 layers"),
    (cut(EVERY, slice(2, None)), "tokens for a prompt of .*--no-enable-prefix-caching"),
    (cut(EVERY, 0), "expected 2 layers of width"),
    (damaged, "no tensor of vllm-lens"),
    (shapeless, "without their shape"),
    (lambda _: (400, "too long"), "answered 400: too long"),
    (lambda _: "<html>", "no JSON"),
]


@pytest.mark.parametrize(("spoil", "says"), FAULTS)
def test_an_answer_that_is_not_what_was_asked_is_an_error(
    spoil: Any, says: str, folder: Path, server: Server
) -> None:
    served = load(folder, server)
    server.spoil = spoil
    with pytest.raises(RuntimeError, match=says):
        capture(served, PROMPTS[:2], ["0.resid_post", "2.resid_post"], progress=False)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (without, "install vllm-lens"),
        (cut(slice(0, 2)), r"of shape \[2, .*expected 3 layers .*runs another model"),
        (cut(EVERY, EVERY, slice(0, 20)), "width.*runs another model than the LlamaForCausalLM"),
    ],
)
def test_another_model_or_no_vllm_lens_is_seen_when_it_is_opened(
    spoil: Any, says: str, folder: Path, server: Server
) -> None:
    server.spoil = spoil
    with pytest.raises(RuntimeError, match=says):
        load(folder, server)


def test_another_tokenizer_is_seen_when_it_is_opened(folder: Path, server: Server) -> None:
    server.routes["/tokenize"] = lambda _: {"tokens": [1, 2, 3]}
    with pytest.raises(ValueError, match=r"other token ids .*\[1, 2, 3\]"):
        load(folder, server)
    del server.routes["/tokenize"]  # a server without a tokenizer only gets ids
    load(folder, server)


def test_prompts_started_again_are_read_again(folder: Path, server: Server) -> None:
    """vllm-lens keeps the rows of the first start, so all after them are of the wrong tokens."""
    served, own = load(folder, server), plain(folder)
    site, wrong = "1.resid_post", 2

    def started_again(answer: dict[str, Any]) -> dict[str, Any]:
        nonlocal wrong
        if not wrong:
            return answer
        wrong, server.preempted = wrong - 1, server.preempted + 1
        return cut(EVERY, [0, *range(len(answer_rows(answer)) - 1)])(answer)

    server.spoil = started_again
    a = capture(served, PROMPTS[:5], site, "all", progress=False)
    b = capture(own, PROMPTS[:5], site, "all", progress=False)
    assert not wrong and error(a.rows(site)[0], b.rows(site)[0]) < 1e-5
    wrong = 100
    with pytest.raises(RuntimeError, match="rows of the wrong tokens: .*--max-num-seqs"):
        capture(served, PROMPTS[:5], site, progress=False)
    server.spoil, wrong = lambda answer: answer, 0
    server.routes["/metrics"] = lambda _: (404, "")
    capture(served, PROMPTS[:5], site, progress=False)


def answer_rows(answer: dict[str, Any]) -> range:
    return range(answer["activations"]["residual_stream"]["shape"][1])


def test_the_server_and_its_model_have_to_be_there(folder: Path, server: Server) -> None:
    with pytest.raises(ValueError, match="start one with `vllm serve MODEL"):
        HookedModel.load(str(folder), engine="vllm")
    with pytest.raises(RuntimeError, match="127.0.0.1:9/v1/models does not answer .*running"):
        HookedModel.load(str(folder), engine="vllm", server="http://127.0.0.1:9")
    server.names = ["a", "b"]
    with pytest.raises(ValueError, match=r"serves 2 models \(a, b\): say which"):
        load(folder, server)
    assert load(folder, server, served="b").fingerprint.endswith("-b")
    with pytest.raises(ValueError, match="does not serve 'c': it has a, b"):
        load(folder, server, served="c")


def test_what_the_server_decides_cannot_be_chosen_here(folder: Path, server: Server) -> None:
    with pytest.raises(ValueError, match="device, device_map cannot be chosen here"):
        load(folder, server, device="cpu", device_map="auto")
    with pytest.raises(ValueError, match="needs engine='vllm', given was 'transformers'"):
        HookedModel.load(str(folder), server=server.address)
    with pytest.raises(ValueError, match="not a model in memory"):
        HookedModel(build("llama"), tiny.tokenizer(), engine="vllm")
    with pytest.raises(ValueError, match="transformers, transformer_lens, nnsight, vllm"):
        HookedModel.load(str(folder), engine="vlm")
