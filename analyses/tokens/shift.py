"""Token-distribution shift: which of the aligned model's tokens would the base not have chosen?

The aligned model answers greedily. Every token of its answers is looked up in the base model's
distribution at the same place (same prompt, same answer so far): rank 1 is *unshifted*, 2 or 3
*marginal*, lower *shifted* (Lin et al. 2023, "The Unlocking Spell on Base LLMs", arXiv 2312.01552,
section 2). What the base reads as the prompt can be chosen (`analyses.tokens.contexts`). The
agreement is that on the aligned model's path; it does not say that both would answer alike.
"""

from collections.abc import Callable, Sequence

import torch

from analyses.tokens import contexts
from analyses.tokens.paths import along, answers_of, pieces, reader, same_tokens, strings
from analyses.tokens.shares import KINDS as KINDS
from analyses.tokens.shares import LIMITS as LIMITS
from analyses.tokens.shift_result import QUANTITIES as QUANTITIES
from analyses.tokens.shift_result import TokenShift
from probes.model import HookedModel
from probes.prompts import Prompt, prompts_hash
from probes.results import Record


def token_shift(
    base: HookedModel,
    aligned: HookedModel,
    prompts: Sequence[Prompt],
    groups: Sequence[str],
    *,
    max_new_tokens: int = 24,
    batch_size: int = 16,
    vocab_size: int | None = None,
    base_context: str = "same",
    top: int = 10,
    progress: Callable[[int], None] | None = None,
) -> TokenShift:
    """Let `aligned` answer the prompts and compare it with `base` at every token of the answers.

    Both models see the answers as the same token ids, `base` behind the context named
    (`contexts.CONTEXTS`). Distributions are over the first `vocab_size` ids, by default those both
    have, and an answer ends before a token beyond them, which the base cannot read. The `top` most
    probable ids of both are kept. Both models are run once over prompts and answers, without their
    heads; logits are made of a few answer positions at a time.
    """
    return measured(
        base, aligned, prompts, groups, [base_context], max_new_tokens=max_new_tokens,
        batch_size=batch_size, vocab_size=vocab_size, top=top, progress=progress,
    )[0]  # fmt: skip


def measured(
    base: HookedModel,
    aligned: HookedModel,
    prompts: Sequence[Prompt],
    groups: Sequence[str],
    base_contexts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int,
    vocab_size: int | None,
    top: int,
    progress: Callable[[int], None] | None,
) -> list[TokenShift]:
    """`token_shift` in several contexts of the base; the aligned model answers and reads once."""
    if len(groups) != len(prompts):
        raise ValueError(
            f"{len(prompts)} prompts came with {len(groups)} groups: give one for each"
        )
    base_contexts = [contexts.check(context) for context in base_contexts]
    same_tokens(base, aligned)
    common = min(base.layout.vocab_size, aligned.layout.vocab_size)
    size = vocab_size or common
    if not 0 < size <= common:
        raise ValueError(f"vocab_size={size}: the models have {common} ids in common")
    template = aligned.template
    rendered = template.render_all(prompts)
    writer = reader(aligned, rendered, max_new_tokens)
    given = [
        [contexts.render(template, prompt, context) for prompt in prompts]
        for context in base_contexts
    ]
    names = [
        "" if context == "same" else f"the base context {context!r}" for context in base_contexts
    ]
    readers = [reader(base, g, max_new_tokens, n) for g, n in zip(given, names, strict=True)]
    answers = answers_of(aligned, prompts, max_new_tokens, 2 * batch_size, size)
    found = along(writer, readers, answers, size, top=top, batch_size=batch_size, progress=progress)
    ids = torch.tensor([i for answer in answers for i in answer], dtype=torch.long)
    tokens = tuple(pieces(aligned.tokenizer, answer) for answer in answers)
    shifts = []
    for context, steps, read in zip(base_contexts, found, given, strict=True):
        listed = torch.cat([steps.top_base.flatten(), steps.top_aligned.flatten(), ids])
        record = Record(
            models=(base.name, aligned.name),
            fingerprints=(base.fingerprint, aligned.fingerprint),
            template_hash=template.hash,
            prompts_hash=prompts_hash(rendered),
            dtype=str(aligned.dtype).removeprefix("torch."),
            engine=aligned.engine.name,
            settings={
                "max_new_tokens": max_new_tokens,
                "batch_size": batch_size,
                "vocab_size": size,
                "base_context": context,
                "base_prompts_hash": prompts_hash(read),
                "top": top,
            },
        )
        shifts.append(
            TokenShift(
                **steps.tensors(),
                prompts=tuple(p if isinstance(p, str) else p[-1]["content"] for p in prompts),
                groups=tuple(groups),
                tokens=tokens,
                ids=ids,
                stops=torch.isin(ids, torch.tensor(aligned._stop_ids(), dtype=torch.long)),
                strings=strings(aligned.tokenizer, listed.unique().tolist()),
                base=base.label,
                aligned=aligned.label,
                base_context=context,
                limit=max_new_tokens,
                record=record,
            )
        )
    return shifts
