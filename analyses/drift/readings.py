"""What the drift ledger reads of one checkpoint: states, refusals, distributions of answer tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from probes.capturing import capture
from probes.contrast import Contrast
from probes.model import HookedModel
from probes.prompts import pad, pad_id_of
from probes.refusals import refuses
from probes.state import state_of

STEPS = 8
"""Answer tokens whose distributions are compared."""

OPENING = 10
"""Tokens of a checkpoint's own answer by which it is judged to refuse."""


@dataclass(frozen=True)
class Path:
    """The reference's greedy answers, which every checkpoint reads behind the same prompts."""

    rows: tuple[tuple[int, ...], ...]
    """Token ids of each prompt with the first `STEPS` tokens of its answer."""
    lengths: tuple[int, ...]
    """Answer tokens in each row."""
    vocab_size: int
    """Ids that base and reference share; distributions are over these."""

    @classmethod
    def of(
        cls,
        model: HookedModel,
        answers: Sequence[Sequence[int]],
        contrast: Contrast,
        vocab_size: int,
    ) -> "Path":
        """From the reference's answers; one ends before an id that is not shared."""
        given = model.template.render_all(contrast.prompts)
        cut = []
        for answer in answers:
            alien = [k for k, token in enumerate(answer) if token >= vocab_size]
            cut.append(tuple(answer[: min([STEPS, *alien])]))
        if not any(cut):
            raise ValueError(
                f"every answer of {model.name} begins with an id beyond the {vocab_size} that base "
                "and reference share: there is no answer that both can read"
            )
        rows = tuple((*r.ids, *answer) for r, answer in zip(given, cut, strict=True))
        return cls(rows, tuple(map(len, cut)), vocab_size)

    @property
    def reached(self) -> Bool[Tensor, "prompt step"]:
        """Where an answer has a token."""
        return torch.arange(max(self.lengths)) < torch.tensor(self.lengths)[:, None]

    @torch.inference_mode()
    def logp(self, model: HookedModel, batch_size: int = 16) -> Float[Tensor, "prompt step vocab"]:
        """Log-probabilities, nats, before each answer token; 0 beyond the end of an answer. Over
        the shared ids, or over those of a model that has fewer."""
        size = min(self.vocab_size, model.layout.vocab_size)
        if max(max(row) for row in self.rows) >= size:
            raise ValueError(
                f"{model.name} has a vocabulary of {size} rows and the reference's answers hold id "
                f"{max(max(row) for row in self.rows)}: it cannot read them"
            )
        found = torch.zeros(len(self.rows), max(self.lengths), size)
        order = sorted(range(len(self.rows)), key=lambda i: len(self.rows[i]))
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            batch = pad([self.rows[i] for i in chunk], pad_id_of(model.tokenizer), "left")
            most = max(self.lengths[i] for i in chunk)
            logits = model.engine.logits(batch, most + 1)
            for row, i in zip(logits, chunk, strict=True):
                n = self.lengths[i]
                found[i, :n] = row[-n - 1 : -1, :size].float().log_softmax(-1).cpu()
        return found


@dataclass(frozen=True)
class Reading:
    """One checkpoint on the prompts of a ledger."""

    states: Float[Tensor, "layer prompt d_model"]
    """`resid_post` of every layer at the last prompt token."""
    refused: Bool[Tensor, " prompt"]
    """Whether its own greedy answer opens with a refusal."""
    logp: Float[Tensor, "prompt step vocab"]
    """On the reference's answers."""


def read(
    model: HookedModel,
    contrast: Contrast,
    path: Path | None = None,
    *,
    vocab_size: int | None = None,
    batch_size: int = 32,
) -> tuple[Reading, Path]:
    """Everything the ledger needs of one model. Without a `path`, the model's own answers are the
    path, over `vocab_size` ids: it is then the reference."""
    acts = capture(model, contrast.prompts, "all.resid_post", batch_size=batch_size, progress=False)
    answers = model.generate_ids(contrast.prompts, OPENING, batch_size=batch_size)
    refused = [refuses(model.tokenizer.decode(ids, skip_special_tokens=True)) for ids in answers]
    path = path or Path.of(model, answers, contrast, vocab_size or model.layout.vocab_size)
    states = torch.stack([acts[site].float() for site in acts.sites])
    return Reading(states, torch.tensor(refused), path.logp(model)), path


@dataclass(frozen=True)
class Weights:
    """Inner products of an update with the alignment matrix, tensor by tensor."""

    names: tuple[str, ...]
    dot: Float[Tensor, " tensor"]
    update: Float[Tensor, " tensor"]
    """Squared norm of the update, checkpoint minus reference."""
    alignment: Float[Tensor, " tensor"]
    """Squared norm of the alignment matrix, reference minus base."""
    size: Tensor
    """Elements compared."""
    reference: Float[Tensor, " tensor"]
    """Squared norm of the reference's tensor."""


def compare_weights(base: HookedModel, reference: HookedModel, model: HookedModel) -> Weights:
    """The update `model - reference` against `reference - base`, one tensor at a time in float64.

    Tied tensors count once. Where vocabularies differ, the rows common to all three count.
    """
    given = [dict(state_of(m.model)) for m in (base, reference, model)]
    for other, weights in zip((base, model), (given[0], given[2]), strict=True):
        if extra := sorted(weights.keys() - given[1].keys()):
            raise ValueError(
                f"{other.name} has {len(extra)} tensors that {reference.name} lacks, first "
                f"{extra[0]}: the weights of a ledger come from checkpoints of one architecture"
            )
    names, dot, update, alignment, size, norms = [], [], [], [], [], []
    seen = set()
    for name, middle in given[1].items():
        if not isinstance(middle, Tensor) or not middle.is_floating_point():
            continue
        if middle.data_ptr() in seen:  # tied to one before
            continue
        seen.add(middle.data_ptr())
        first, last = _same(given[0], base, name, middle), _same(given[2], model, name, middle)
        rows = min(t.shape[:1].numel() for t in (first, middle, last))
        b, r, m = (
            (t.detach()[:rows] if t.ndim else t.detach()).cpu().double()
            for t in (first, middle, last)
        )
        V, U = r - b, m - r
        names.append(name)
        dot.append((U * V).sum())
        update.append(U.square().sum())
        alignment.append(V.square().sum())
        size.append(U.numel())
        norms.append(r.square().sum())
    if not names:
        raise ValueError(
            f"{reference.name} holds no floating point weights: load checkpoints without "
            "quantisation to compare them"
        )
    return Weights(
        tuple(names),
        torch.stack(dot),
        torch.stack(update),
        torch.stack(alignment),
        torch.tensor(size),
        torch.stack(norms),
    )


def _same(weights: dict, model: HookedModel, name: str, like: Tensor) -> Tensor:
    found = weights.get(name)
    if not isinstance(found, Tensor) or not found.is_floating_point():
        raise ValueError(
            f"{model.name} has no floating point tensor {name}: the weights of a ledger come from "
            "checkpoints of one architecture, loaded without quantisation"
        )
    rows_may_differ = name.rpartition(".")[0].rpartition(".")[2] in _VOCABULARY
    if found.shape[rows_may_differ:] != like.shape[rows_may_differ:]:
        raise ValueError(
            f"{name} has shape {tuple(found.shape)} in {model.name} and {tuple(like.shape)} in the "
            "reference: the weights of a ledger come from checkpoints of one model"
        )
    return found


_VOCABULARY = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings")
"""Modules whose rows are token ids, which checkpoints may have more or fewer of."""
