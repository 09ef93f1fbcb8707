"""`HookedModel`: one language model with its tokenizer, its layout and one engine."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probes import layout as layouts
from probes import names, prompts, selfcheck
from probes.engines import (
    ENGINES,
    REMOTE,
    Batch,
    Edit,
    EditFunction,
    Engine,
    open_engine,
    unknown,
)
from probes.layout import Layout
from probes.prompts import Prompt, Rendered, Template
from probes.sites import Site, Sites

_HARMLESS = {"attn_implementation", "device_map", "max_memory", "offload_folder"}
"""Options of `from_pretrained` that leave the weights what they are in the files."""

Edits = Mapping[str, EditFunction] | Sequence[Edit]
"""Edits as `Edit` objects, or as site text -> function (acting on all tokens)."""


@runtime_checkable
class Steers(Protocol):
    """What `generate(..., steer=...)` takes: anything that says its edits for a model."""

    def edits(self, model: "HookedModel") -> Sequence[Edit]: ...


class HookedModel:
    """A language model whose activations can be read and edited.

    `HookedModel.load("builtin:aligned")` loads by name (forms: see `probes.names`);
    `HookedModel(model, tokenizer)` takes one already in memory: a transformers model in
    evaluation mode, a TransformerLens `TransformerBridge` or an nnsight model, whose engine is
    then used. The model is never changed. The first use of a model with an engine checks that
    the engine's values are right (`probes.selfcheck`).
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        engine: str | None = None,
        template: str | None = None,
        template_arguments: Mapping[str, Any] | None = None,
        name: str | None = None,
        fingerprint: str | None = None,
    ) -> None:
        wrapped, plain = _unwrap(model)
        if engine is not None and engine not in ENGINES and engine != wrapped:
            raise ValueError(unknown(engine))
        if wrapped is not None and engine not in (None, wrapped):
            raise ValueError(
                f"the model in memory is a {type(model).__name__}, whose engine is {wrapped!r}; "
                f"engine={engine!r} would need the plain transformers model"
            )
        self.model: nn.Module = plain
        self.tokenizer = tokenizer
        self.name = name or type(plain).__name__
        self.label = self.name
        served = wrapped in REMOTE
        self.layout: Layout = model.layout if served else layouts.resolve(plain)
        self.engine: Engine = (
            model
            if served
            else _engine(engine or wrapped or "transformers", model, plain, self.layout)
        )
        self._template = template
        self._arguments = template_arguments
        self._fingerprint = fingerprint
        self.check = (
            model.check
            if served
            else selfcheck.check(plain, self.engine, self.layout, tokenizer, self.fingerprint)
        )

    @classmethod
    def load(
        cls,
        name: str,
        engine: str = "transformers",
        *,
        dtype: str | torch.dtype = "float32",
        device: str | None = None,
        template: str | None = None,
        template_arguments: Mapping[str, Any] | None = None,
        server: str | None = None,
        **options: Any,
    ) -> "HookedModel":
        """Load a model by name.

        `dtype` is a torch dtype, its name, or "auto" for the checkpoint's own. `device` is "cpu",
        "cuda", "mps" or None for the best there is. `template` is a Jinja chat template or
        "none"; by default the tokenizer's own is used. Other options (`device_map`,
        `attn_implementation`, ...) go to transformers; `device_map` needs the plain engine.

        `engine="vllm"` reads the model from a running vLLM server with vllm-lens at the address
        `server`; of `name` only configuration and tokenizer are loaded, and the server decides
        dtype and device. Options are `served`, the model's name there where it has several, and
        `concurrency`, the requests under way at once (8).
        """
        if engine not in (*ENGINES, *REMOTE):
            raise ValueError(unknown(engine))
        if server is not None and engine not in REMOTE:
            raise ValueError(f"server={server!r} needs engine='vllm', given was {engine!r}")
        if "device_map" in options and engine not in ("transformers", *REMOTE):
            raise ValueError("device_map needs engine='transformers': the others copy the model")
        parsed = names.parse(name)
        if isinstance(dtype, str) and dtype != "auto":
            dtype = _dtype(dtype)
        if engine in REMOTE:
            from probes.served import connect

            model, tokenizer, fingerprint = connect(parsed, server, dtype, device, options)
        else:
            model, tokenizer = names.load(parsed, dtype=dtype, **options)
            if "device_map" not in options:
                model = model.to(device or _best_device())
            # a model quantised or otherwise altered is not that of the files: hash what was loaded
            same = set(options) <= _HARMLESS
            fingerprint = names.fingerprint_files(parsed) if same else None
            if fingerprint is not None:
                fingerprint += f"-{model.dtype}".replace("torch.", "")
        hooked = cls(
            model,
            tokenizer,
            engine=engine,
            template=template,
            template_arguments=template_arguments,
            name=name,
            fingerprint=fingerprint,
        )
        hooked.label = parsed.label
        return hooked

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over config, tokenizer and weights; two models with one are the same."""
        return self._fingerprint or names.fingerprint_memory(self.model, self.tokenizer)

    @cached_property
    def template(self) -> Template:
        """How prompts become token ids; an error when the model leaves that open."""
        if self.tokenizer is None:
            raise ValueError(
                f"{self.name} was given without a tokenizer: pass HookedModel(model, tokenizer), "
                "or give token ids with `engine.read(Batch(ids, mask), sites)`"
            )
        return prompts.choose_template(
            self.tokenizer, self.name, self._template, self._arguments, self.context_length
        )

    @property
    def n_layers(self) -> int:
        return self.layout.n_layers

    @property
    def d_model(self) -> int:
        return self.layout.d_model

    @property
    def context_length(self) -> int | None:
        """Longest prompt the model was made for, in tokens; None when it does not say."""
        text = self.model.config.get_text_config()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        length = getattr(text, "max_position_embeddings", None)
        return length if isinstance(length, int) else None

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        """Where token ids go: that of the first weight really in memory."""
        for p in self.model.parameters():
            if p.device.type != "meta":
                return p.device
        return torch.device("cpu")

    def packs(self, length: int) -> bool:
        """Whether prompts of up to `length` tokens may share a row when captured.

        A mask of one's own replaces the sliding window, so nothing may reach past the window.
        """
        text = self.model.config.get_text_config()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        windows = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
        return self.check.packs and all(length <= w for w in windows if isinstance(w, int))

    def sites(self, sites: Sites) -> tuple[Site, ...]:
        """The sites named, each checked to exist in this model."""
        return self.layout.sites(sites)

    def batch(self, rendered: Sequence[Rendered], side: str = "left") -> Batch:
        """Rendered prompts as one padded batch on the model's device."""
        batch = prompts.pad([r.ids for r in rendered], prompts.pad_id_of(self.tokenizer), side)
        n_prompt = torch.tensor([r.n_prompt for r in rendered])
        return replace(batch, n_prompt=n_prompt).to(self.device)

    def edit(self, edits: Edits) -> AbstractContextManager[None]:
        """While open, everything this model computes runs with the edits.

        An edit is a function `(h, where) -> h` at a site; `h` is `[batch, seq, width]`, or
        `[batch, seq, head, width]` for a whole part with heads.
        """
        if isinstance(edits, Mapping):
            edits = [
                Edit(site, function)
                for text, function in edits.items()
                for site in self.sites(text)
            ]
        resolved = [
            Edit(edit.site.resolve(self.n_layers), edit.function, edit.scope) for edit in edits
        ]
        return self.engine.edit(resolved)

    def logits(self, given: Sequence[Prompt]) -> Float[Tensor, "prompt vocab"]:
        """Logits of the first token of each prompt's answer, float32 on the CPU."""
        rows = []
        for chunk in self._chunks(self.template.render_all(given), 16):
            rows.append(self.engine.logits(self.batch(chunk), 1)[:, -1].float().cpu())
        return torch.cat(rows)

    def logprobs(
        self, given: Sequence[Prompt], answers: Sequence[str], batch_size: int = 16
    ) -> list[Float[Tensor, " answer"]]:
        """Log-probability of each token of each answer given its prompt, in nats."""
        rendered = self.template.render_all(given, answers)
        found: list[Tensor] = []
        for chunk in self._chunks(rendered, batch_size):
            batch = self.batch(chunk, "right")
            logits = self.engine.logits(batch)
            for row, r in zip(logits, chunk, strict=True):
                end = len(r.ids)
                steps = row[r.n_prompt - 1 : end - 1].float().log_softmax(-1)
                answer = torch.tensor(r.ids[r.n_prompt : end], device=steps.device)
                found.append(steps.gather(1, answer[:, None])[:, 0].cpu())
        return found

    def generate(
        self,
        given: Sequence[Prompt],
        max_new_tokens: int = 64,
        *,
        edits: Edits = (),
        steer: Steers | None = None,
        batch_size: int = 32,
        progress: Callable[[int], None] | None = None,
    ) -> list[str]:
        """Greedy answers, without penalties whatever defaults the checkpoint ships.

        `edits` act as their scope says: on the prompt, on generated tokens, or on both. `steer`
        is a `SteeringVector`, `HeadOffsets`, or a `Steering` (either with a strength).
        """
        return [
            self.tokenizer.decode(ids, skip_special_tokens=True)
            for ids in self.generate_ids(
                given,
                max_new_tokens,
                edits=edits,
                steer=steer,
                batch_size=batch_size,
                progress=progress,
            )
        ]

    def generate_ids(
        self,
        given: Sequence[Prompt],
        max_new_tokens: int = 64,
        *,
        edits: Edits = (),
        steer: Steers | None = None,
        batch_size: int = 32,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[int]]:
        """The same as token ids; an answer that ended keeps its stop token."""
        rendered = self.template.render_all(given)
        stops = self._stop_ids()
        pad_id = prompts.pad_id_of(self.tokenizer)
        # neighbours of one length waste the least padding
        order = sorted(range(len(rendered)), key=lambda i: len(rendered[i].ids))
        found: dict[int, list[int]] = {}
        with self.edit(edits), self.edit(() if steer is None else steer.edits(self)):
            for chunk in self._chunks(order, batch_size):
                batch = self.batch([rendered[i] for i in chunk])
                out = self.engine.generate(batch, max_new_tokens, stops, pad_id).tolist()
                for i, ids in zip(chunk, out, strict=True):
                    ends = [n for n, token in enumerate(ids) if token in stops]
                    found[i] = ids[: ends[0] + 1] if ends else ids
                if progress:
                    progress(len(chunk))
        return [found[i] for i in range(len(rendered))]

    def _stop_ids(self) -> list[int]:
        own = getattr(self.model.generation_config, "eos_token_id", None)
        ids = own if isinstance(own, list) else [own]
        ids = [*ids, getattr(self.tokenizer, "eos_token_id", None)]
        return sorted({i for i in ids if isinstance(i, int)})

    @staticmethod
    def _chunks(items: Sequence, size: int) -> Iterator[Sequence]:
        for start in range(0, len(items), size):
            yield items[start : start + size]

    def __repr__(self) -> str:
        return (
            f"HookedModel({self.name!r}, engine={self.engine.name!r}, {self.n_layers} layers, "
            f"d_model {self.d_model}, {str(self.dtype).removeprefix('torch.')})"
        )


def _unwrap(model: Any) -> tuple[str | None, nn.Module]:
    """The engine a model in memory already belongs to, and the transformers model inside."""
    package = type(model).__module__.partition(".")[0]
    if type(model).__module__ == "probes.engines.vllm":
        return "vllm", model.model
    if package == "transformer_lens":
        from probes.engines.lens import unwrapped

        return "transformer_lens", unwrapped(model)
    if package == "nnsight":
        return "nnsight", model._module
    if package == "peft":  # adapters stay live inside the modules
        return None, model.get_base_model()
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise TypeError(
            f"expected a transformers model, a TransformerBridge or an nnsight model, got "
            f"{type(model).__name__}; to load by name use HookedModel.load(name)"
        )
    return None, model


def _engine(name: str, given: Any, plain: nn.Module, layout: Layout) -> Engine:
    if given is plain or type(given).__module__.startswith("peft"):
        return open_engine(name, plain, layout)
    if name == "transformer_lens":
        from probes.engines.lens import LensEngine

        return LensEngine.of_bridge(given, layout)
    from probes.engines.trace import TraceEngine

    return TraceEngine.of_nnsight(given, layout)


def _dtype(name: str) -> torch.dtype:
    found = getattr(
        torch, {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(name, name), None
    )
    if not isinstance(found, torch.dtype):
        raise ValueError(f"unknown dtype {name!r}: use float32, bfloat16, float16 or auto")
    return found


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
