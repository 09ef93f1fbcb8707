"""The serving engine: activations read from a running vLLM server with vllm-lens, over HTTP.

The weights stay in the server. vllm-lens returns what leaves a block, at all tokens of a prompt,
so `resid_post` can be read, and `resid_pre` as what left the block before. Token ids are sent,
never text, and what comes back is held against what was asked: vllm-lens answers with status 200
also where it returns less.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from probes.engines import Batch, Edit, Keep, whole
from probes.layout import Layout
from probes.selfcheck import Check
from probes.servers import Refused, ask, post, served_model
from probes.sites import Site, Unsupported
from probes.wire import decode

CONCURRENCY = 8
"""Requests under way at once; the server runs them as one batch."""

ELSEWHERE = (
    "a vLLM server returns what leaves each block only: read resid_post (or resid_pre of a block "
    "after the first), or load the model with engine='transformers'"
)
"""What is said where another part is asked for."""

T = TypeVar("T")


class VllmEngine:
    """Reads the residual stream of the model that a server runs.

    `model` is the same model without weights (on the meta device) and `layout` says how many layers
    of what width to expect. Opening the engine asks one short prompt at all layers; a server that
    does not answer, has no vllm-lens or runs a model of other sizes is an error.
    """

    name = "vllm"
    edited = False

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        server: str,
        *,
        served: str | None = None,
        concurrency: int = CONCURRENCY,
    ) -> None:
        """`served` is the name of the model there; it may be left out where the server has one."""
        if concurrency < 1:
            raise ValueError(f"concurrency is {concurrency}, expected at least 1")
        self.address, self.concurrency = server.rstrip("/"), concurrency
        self.served = served_model(self.address, served)
        self.layout = layout
        self.longest = self._longest()
        ids = [(7 * i + 5) % min(self.layout.vocab_size, 180) for i in range(6)]
        dtype = self._ask(ids, None).dtype
        self.model = model.to(dtype)  # it has no values: this only says what comes over the wire
        self.check = Check(
            self.name, str(dtype).removeprefix("torch."), math.nan, math.nan, math.nan, False,
            math.nan,
        )  # fmt: skip

    def read(self, batch: Batch, sites: Sequence[Site], keep: Keep = whole) -> dict[Site, Tensor]:
        """See `Engine.read`. One request a row, several at once; values at pads are 0.

        All tokens of the batch are held at all layers asked for until `keep` has taken its part.
        """
        if batch.visible is not None:
            raise Unsupported("a server takes one prompt a row: rows that pack several stay here")
        sources = {site: self._source(site) for site in sites}
        layers = sorted(set(sources.values()))
        mask = batch.mask.bool().cpu()
        rows = [ids[real].tolist() for ids, real in zip(batch.ids.cpu(), mask, strict=True)]
        ends = torch.tensor([len(row) for row in rows]).cumsum(0).tolist()
        size = (len(layers), ends[-1], self.layout.d_model)
        values = torch.empty(size, dtype=next(self.model.parameters()).dtype)

        def fetch(i: int) -> None:
            # written at once, so that answers do not pile up beside the tensor they go into
            values[:, ends[i] - len(rows[i]) : ends[i]] = self._ask(rows[i], layers)

        before = self._preemptions()
        self._each(fetch, len(rows), self.concurrency)
        if self._preemptions() != before:
            before = self._preemptions()
            self._each(fetch, len(rows), 1)
            if self._preemptions() != before:
                raise RuntimeError(
                    f"{self.address} runs out of room for keys and values and starts prompts "
                    "again, and vllm-lens then returns rows of the wrong tokens: let it do less at "
                    "a time (--max-num-seqs) or give it more memory"
                )
        found = {}
        for site, layer in sources.items():
            h = values.new_zeros(*mask.shape, self.layout.d_model)
            h[mask] = values[layers.index(layer)]
            found[site] = keep(h)
        return found

    @contextmanager
    def edit(self, edits: Sequence[Edit]) -> Iterator[None]:
        """No edits, that is; any is refused."""
        if edits:
            raise Unsupported(
                f"the edit at {edits[0].site} is a function, and a server takes vectors: send them "
                "with each request (steering.export.client), or load the model with "
                "engine='transformers'"
            )
        yield

    def logits(self, batch: Batch, last: int | None = None) -> Float[Tensor, "batch seq vocab"]:
        """Refused: a server gives its likeliest tokens, not the whole row."""
        raise Unsupported(
            "a vLLM server returns log-probabilities of its likeliest tokens, not the logits of "
            "all: load the model with engine='transformers'"
        )

    def generate(
        self, batch: Batch, max_new_tokens: int, stop_ids: Sequence[int], pad_id: int
    ) -> Int[Tensor, "batch new"]:
        mask = batch.mask.bool()
        rows = [ids[real].tolist() for ids, real in zip(batch.ids, mask, strict=True)]
        asked: dict[str, Any] = {
            "max_tokens": max_new_tokens,
            "repetition_penalty": 1.0,  # the checkpoint's own default otherwise
            "ignore_eos": True,
            "stop_token_ids": list(stop_ids),
            "return_token_ids": True,
        }

        def answer(i: int) -> list[int]:
            choice = self._complete(rows[i], asked)["choices"][0]
            if not isinstance(found := choice.get("token_ids"), list):
                raise RuntimeError(
                    f"{self.address} does not say the token ids of its answers: update vLLM"
                )
            return found

        answers = self._each(answer, len(rows), self.concurrency)
        out = torch.full((len(rows), max(map(len, answers))), pad_id, dtype=torch.long)
        for i, ids in enumerate(answers):
            out[i, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        return out

    def _source(self, site: Site) -> int:
        """The block whose output is read for a site."""
        self.layout.check(site)
        if site.part not in ("resid_post", "resid_pre"):
            raise Unsupported(f"{site} cannot be read here: {ELSEWHERE}")
        return site.layer if site.part == "resid_post" else site.layer - 1

    def _ask(
        self, ids: Sequence[int], layers: Sequence[int] | None
    ) -> Float[Tensor, "layer seq d"]:
        """What left the layers (None: all) at all tokens of one prompt, ascending by layer."""
        if self.longest is not None and len(ids) >= self.longest:
            raise ValueError(
                f"a prompt of {len(ids)} tokens does not fit: {self.address} takes "
                f"{self.longest - 1} (one less than its --max-model-len)"
            )
        # as a string, because arguments of that field are scalars
        wanted = "true" if layers is None else json.dumps(list(layers))
        fields = {"max_tokens": 1, "vllm_xargs": {"output_residual_stream": wanted}}
        got = self._complete(ids, fields).get("activations") or {}
        if "residual_stream" not in got:
            raise RuntimeError(
                f"{self.address} answers without activations: install vllm-lens in the server's "
                "Python, unset VLLM_LENS_DISABLE there, and start it again"
            )
        n = self.layout.n_layers if layers is None else len(layers)
        try:
            shape = tuple(got["residual_stream"]["shape"])
        except (KeyError, TypeError) as error:
            raise RuntimeError(f"{self.address} sent activations without their shape") from error
        self._compare(shape, (n, len(ids), self.layout.d_model))
        try:
            return decode(got["residual_stream"], most=math.prod(shape))
        except ValueError as error:
            raise RuntimeError(f"{self.address}: {error}") from error

    def _compare(self, shape: tuple[int, ...], meant: tuple[int, int, int]) -> None:
        """Refuse activations of another shape than (layers, tokens, width) as asked for."""
        if len(shape) != 3 or (shape[0], shape[2]) != (meant[0], meant[2]):
            raise RuntimeError(
                f"{self.served!r} at {self.address} gave activations of shape {list(shape)}, "
                f"expected {meant[0]} layers of width {meant[2]}: it runs another model than the "
                f"{self.layout.architecture} loaded here"
            )
        if shape[1] != meant[1]:
            raise RuntimeError(
                f"{self.served!r} at {self.address} gave activations of {shape[1]} tokens for a "
                f"prompt of {meant[1]}: start it with --no-enable-prefix-caching and without "
                "speculative decoding"
            )

    def _complete(self, ids: Sequence[int], fields: dict[str, Any]) -> dict[str, Any]:
        body = {"model": self.served, "prompt": list(ids), "temperature": 0, **fields}
        return post(f"{self.address}/v1/completions", body)

    def _each(self, do: Callable[[int], T], n: int, at_once: int) -> list[T]:
        """`do` of 0 to n - 1, several at once; after an error no more is begun."""
        with ThreadPoolExecutor(at_once) as pool:
            jobs = [pool.submit(do, i) for i in range(n)]
            try:
                return [job.result() for job in jobs]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _longest(self) -> int | None:
        """Tokens of a prompt and its answer that the server takes, if it says so."""
        for card in post(f"{self.address}/v1/models").get("data") or []:
            if card.get("id") == self.served and isinstance(card.get("max_model_len"), int):
                return card["max_model_len"]
        return None

    def _preemptions(self) -> float:
        """How often the server has started a request again for want of memory; 0 if not said."""
        try:
            text = ask(f"{self.address}/metrics").decode(errors="replace")
        except Refused:
            return 0.0
        lines = [
            line for line in text.splitlines() if line.startswith("vllm:num_preemptions_total")
        ]
        return sum((float(line.split()[-1]) for line in lines), 0.0)
