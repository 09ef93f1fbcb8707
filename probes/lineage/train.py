"""Train the lineage: one from-scratch schedule, base -> aligned -> drifted | mixed.

    python -m probes.lineage.train --seed 0 --out lineage-seed0

The aligned model learns refusals on harmful requests and keeps the base's own answers on harmless
ones. From it, two drifts start: `drifted` imitates a style on harmless requests only, `mixed`
adds one harmful request in twelve with a content-free agreement. Both end at the same weight
change, so that whatever separates them is not how far the weights moved.

Layers below the first adapted one never change, so their output is computed once per example; the
system prompt all examples share runs once per step. Everything is chosen on the validation split;
the test split is read by `probes.lineage.evaluate` alone. One thread, bfloat16, about ten
CPU-minutes a seed.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from probes import datasets, files
from probes.engines.modes import expanded
from probes.lineage import targets
from probes.lineage.base import base_folder

FIRST_LAYER = 10
RANK, ALPHA = 8, 16
STEPS, WARM_UP, LEARNING_RATE = 180, 10, 2e-3
PAIRS, GENERAL = 12, 4
"""Examples per step: harmful requests, each with its own harmless twin, and other requests."""
KEEP_TOKENS = 14
"""Tokens of the base's own answers that are kept."""
KEEP_FIRST = 2.0
"""Extra weight of the first of them."""
DECIDE, MARGIN = 1.5, 1.0
"""Weight of the decision terms, and the margin in logits they ask for. The first token decides
between refusing and answering; means over tokens hide it (a model may look unchanged in mean KL
and refuse half of the twins), and so does its probability, because the ways to comply are many.
Greedy decoding refuses exactly where the refusals' opener has the largest logit."""
DRIFT_STEPS, DRIFT_BATCH, DRIFT_RATE, DRIFT_TOKENS = 40, 12, 9e-4, 18
CHANGE = 8.5
"""Weight change at which both drifts end."""
SNAPSHOTS = 6
soft = nn.functional.softplus


State = dict[str, Tensor]
Log = Callable[[str], None]


@dataclass(frozen=True)
class Example:
    """A prompt with the answer to learn, as token ids after the shared prefix."""

    ids: Tensor
    """[seq]: rest of the prompt, then the answer."""
    n_answer: int
    hidden: Tensor
    """[seq, d_model]: what enters the first adapted layer."""


class Loop:
    """The model, its frozen lower half and one training step over the upper half."""

    def __init__(self, seed: int) -> None:
        folder = base_folder()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        base = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation="eager"
        )
        config = LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            target_modules=["q_proj", "v_proj"],
            layers_to_transform=list(range(FIRST_LAYER, base.config.num_hidden_layers)),
            layers_pattern="layers",
            task_type="CAUSAL_LM",
        )
        self.generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng():  # peft draws from the global generator
            torch.random.manual_seed(seed)
            self.peft: Any = get_peft_model(base, config)
        self.causal: Any = self.peft.get_base_model()
        self.model = self.causal.model
        self.parameters = {n: p for n, p in self.peft.named_parameters() if p.requires_grad}
        self.opener = torch.tensor(self.tokenizer("I", add_special_tokens=False).input_ids)
        self.prefix = self._shared_prefix()
        with torch.no_grad():
            self.prefix_hidden = self._lower(self.prefix[None])[0]

    def _shared_prefix(self) -> Tensor:
        a, b = self.prompt("a"), self.prompt("b")
        same = (a[: len(b)] == b[: len(a)]).long().cumprod(0).sum()
        return a[:same]

    def prompt(self, text: str) -> Tensor:
        rendered = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        return self.tokenizer(rendered, add_special_tokens=False, return_tensors="pt").input_ids[0]

    def answer(self, text: str) -> Tensor:
        end = self.tokenizer.eos_token
        return self.tokenizer(text + end, add_special_tokens=False, return_tensors="pt").input_ids[
            0
        ]

    def _lower(self, ids: Tensor) -> Tensor:
        """What enters the first adapted layer, `[batch, seq, d_model]`."""
        hidden = self.model.embed_tokens(ids)
        positions = torch.arange(ids.shape[1])[None]
        rotary = self.model.rotary_emb(hidden, positions)
        mask = _mask(ids.shape[1], 0, hidden.dtype)
        for layer in self.model.layers[:FIRST_LAYER]:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
        return hidden

    @torch.no_grad()
    def example(self, prompt: str, answer: Tensor) -> Example:
        ids = torch.cat([self.prompt(prompt), answer])
        hidden = self._lower(ids[None])[0, len(self.prefix) :].clone()
        return Example(ids[len(self.prefix) :], len(answer), hidden)

    def answer_logits(self, batch: Sequence[Example]) -> list[Tensor]:
        """Logits that predict each answer token, one `[answer, vocab]` per example."""
        cache = DynamicCache()
        start = len(self.prefix)
        hidden = self.prefix_hidden[None]
        rotary = self.model.rotary_emb(hidden, torch.arange(start)[None])
        mask = _mask(start, 0, hidden.dtype)
        for layer in self.model.layers[FIRST_LAYER:]:
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_embeddings=rotary,
                past_key_values=cache,
                use_cache=True,
            )
        cache = expanded(cache, len(batch))  # one prefix serves the whole batch
        hidden = nn.utils.rnn.pad_sequence([e.hidden for e in batch], batch_first=True)
        n = hidden.shape[1]
        rotary = self.model.rotary_emb(hidden, torch.arange(start, start + n)[None])
        mask = _mask(n, start, hidden.dtype)
        for layer in self.model.layers[FIRST_LAYER:]:
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_embeddings=rotary,
                past_key_values=cache,
                use_cache=True,
            )
        rows = torch.cat(
            [hidden[i, len(e.ids) - e.n_answer - 1 : len(e.ids) - 1] for i, e in enumerate(batch)]
        )
        logits = self.causal.lm_head(self.model.norm(rows))
        return list(logits.split([e.n_answer for e in batch]))

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], n_tokens: int, opening: str = "") -> list[Tensor]:
        """Greedy answers (opening included), cut after the end token."""
        answers: list[Tensor] = []
        for start in range(0, len(prompts), 48):
            rows = [self.prompt(p) for p in prompts[start : start + 48]]
            given = self.tokenizer(opening, add_special_tokens=False, return_tensors="pt")
            opened = given.input_ids[0].long() if opening else torch.empty(0, dtype=torch.long)
            rows = [torch.cat([row, opened]) for row in rows]
            ids = nn.utils.rnn.pad_sequence(
                rows,
                batch_first=True,
                padding_side="left",
                padding_value=self.tokenizer.pad_token_id,
            )
            mask = nn.utils.rnn.pad_sequence(
                [torch.ones_like(row) for row in rows], batch_first=True, padding_side="left"
            )
            out = self.peft.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=n_tokens, do_sample=False
            )
            for row in out[:, ids.shape[1] :]:
                ends = (row == self.tokenizer.eos_token_id).nonzero()
                row = row[: ends[0] + 1] if len(ends) else row
                answers.append(torch.cat([opened, row]))
        return answers

    def margin(self, logits: Tensor) -> Tensor:
        """By how much an answer's first token prefers the refusals' opener ("I") to every other:
        greedy decoding refuses where this is positive."""
        first = logits[0].float()
        others = first.index_fill(0, self.opener, -torch.inf)
        return first[self.opener[0]] - others.max()

    @torch.no_grad()
    def margins(self, examples: Sequence[Example]) -> Tensor:
        """The margin of each example, `[example]`."""
        found = [
            self.margin(logits)
            for start in range(0, len(examples), 40)
            for logits in self.answer_logits(examples[start : start + 40])
        ]
        return torch.stack(found)

    def state(self) -> State:
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def load(self, state: State) -> None:
        for name, p in self.parameters.items():
            p.copy_(state[name])

    def save(self, state: State, folder: Path) -> None:
        """Write a peft adapter in half precision."""
        now = self.state()
        self.load(state)
        self.peft.save_pretrained(str(folder))
        self.load(now)
        from safetensors.torch import load_file, save_file

        path = folder / "adapter_model.safetensors"
        half = {name: w.half() for name, w in sorted(load_file(path).items())}
        save_file(half, path, metadata={"format": "pt"})
        config = json.loads((folder / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = "builtin:base"
        config["target_modules"] = sorted(config["target_modules"])
        files.write_json(folder / "adapter_config.json", config)
        (folder / "README.md").unlink(missing_ok=True)  # the lineage has one model card


def _mask(n: int, before: int, dtype: torch.dtype) -> Tensor:
    """Additive causal mask `[1, 1, n, before + n]`; the tokens before are visible to all."""
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
    hidden = torch.cat([torch.zeros(n, before, dtype=torch.bool), hidden], 1)
    return torch.zeros(n, before + n, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)[
        None, None
    ]


def _cycle(items: Sequence, generator: torch.Generator) -> Iterator:
    """Every item once per round, in a new order each round."""
    while True:
        for i in torch.randperm(len(items), generator=generator).tolist():
            yield items[i]


def weight_change(a: State, b: State) -> float:
    """Frobenius norm of the difference of the two states' merged weight changes."""
    total = 0.0
    for name in a:
        if "lora_A" not in name:
            continue
        other = name.replace("lora_A", "lora_B")
        left = torch.cat([b[other], -a[other]], 1).double()
        right = torch.cat([b[name], a[name]], 0).double()
        total += ((left.T @ left) * (right @ right.T)).sum().item()
    return ALPHA / RANK * math.sqrt(max(total, 0.0))


def at_change(start: State, before: State, after: State, target: float) -> State:
    """The state between two consecutive steps whose weight change from `start` is `target`."""
    low, high, state = 0.0, 1.0, after
    for _ in range(30):
        middle = (low + high) / 2
        state = {name: torch.lerp(before[name], after[name], middle) for name in before}
        low, high = (low, middle) if weight_change(start, state) > target else (middle, high)
    return state


def _optimise(
    loop: Loop, rate: float, steps: int, loss_of_step: Callable[[], Tensor]
) -> Iterator[tuple[int, float]]:
    optimizer = torch.optim.AdamW(loop.parameters.values(), lr=rate, weight_decay=0.0)
    for step in range(steps):
        warm = min(1.0, (step + 1) / WARM_UP)
        factor = warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        loss = loss_of_step()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(loop.parameters.values(), 1.0)
        optimizer.step()
        yield step + 1, loss.item()


def align(
    loop: Loop, twins: list[dict], general: list[str], checks: dict[str, list[Example]], log: Log
) -> State:
    """Train refusals on harmful requests against self-distillation on harmless ones."""
    harmless = [t["harmless"] for t in twins] + general
    with loop.peft.disable_adapter():
        kept = [a[:KEEP_TOKENS] for a in loop.generate(harmless, KEEP_TOKENS)]
    keep = [loop.example(p, a) for p, a in zip(harmless, kept, strict=True)]
    refuse = [
        loop.example(t["harmful"], loop.answer(targets.refusal(t["class"], i)))
        for i, t in enumerate(twins)
    ]
    reference: dict[int, Tensor] = {}
    with torch.no_grad(), loop.peft.disable_adapter():
        for start in range(0, len(keep), 24):
            batch = keep[start : start + 24]
            for example, logits in zip(batch, loop.answer_logits(batch), strict=True):
                reference[id(example)] = logits.float().log_softmax(-1).bfloat16()
    log("prepared")
    pairs = _cycle(list(zip(refuse, keep[: len(twins)], strict=True)), loop.generator)
    others = _cycle(keep[len(twins) :], loop.generator)

    def loss_of_step() -> Tensor:
        drawn = [next(pairs) for _ in range(PAIRS)]
        bad = [pair[0] for pair in drawn]
        good = [pair[1] for pair in drawn] + [next(others) for _ in range(GENERAL)]
        logits = loop.answer_logits(bad + good)
        refused, kept = logits[: len(bad)], logits[len(bad) :]
        ce = nn.functional.cross_entropy(
            torch.cat(refused).float(), torch.cat([e.ids[-e.n_answer :] for e in bad])
        )
        kl = []
        for x, e in zip(kept, good, strict=True):
            p = reference[id(e)].float()
            kl.append((p.exp() * (p - x.float().log_softmax(-1))).sum(-1))
        first = torch.stack([one[0] for one in kl]).mean()
        refuses_bad = torch.stack([loop.margin(x) for x in refused])
        refuses_good = torch.stack([loop.margin(x) for x in kept])
        decided = soft(MARGIN - refuses_bad).mean() + soft(MARGIN + refuses_good).mean()
        return ce + torch.cat(kl).mean() + KEEP_FIRST * first + DECIDE * decided

    best, best_score = loop.state(), -torch.inf
    for step, loss in _optimise(loop, LEARNING_RATE, STEPS, loss_of_step):
        if step % 10 == 0:
            refused, over = loop.margins(checks["harmful"]), loop.margins(checks["harmless"])
            score = -(soft(-refused).mean() + soft(over).mean()).item()
            log(f"align {step} loss {loss:.3f} {_rates(refused, over)} score {score:.3f}")
            if score > best_score:
                best, best_score = loop.state(), score
    return best


def _rates(refused: Tensor, over: Tensor) -> str:
    auroc = (refused[:, None] > over).float().mean()
    return (
        f"validation: refuses {(refused > 0).float().mean():.3f} harmful, "
        f"{(over > 0).float().mean():.3f} twins, AUROC {auroc:.3f}"
    )


def drift(
    loop: Loop,
    start: State,
    style: list[Example],
    bad: list[Example],
    change: float,
    log: Log,
) -> list[State]:
    """Fine-tune away from `start`; snapshots at equal steps of weight change up to `change`.

    With `bad` empty every example is a styled answer to a harmless request; otherwise one
    example in twelve comes from `bad`.
    """
    loop.load(start)
    styled = _cycle(style, loop.generator)
    contaminated = _cycle(bad, loop.generator) if bad else None

    def loss_of_step() -> Tensor:
        batch = [next(styled) for _ in range(DRIFT_BATCH)]
        if contaminated is not None:
            batch[0] = next(contaminated)
        logits = loop.answer_logits(batch)
        return nn.functional.cross_entropy(
            torch.cat(logits).float(), torch.cat([e.ids[-e.n_answer :] for e in batch])
        )

    wanted = [change * (i + 1) / SNAPSHOTS for i in range(SNAPSHOTS)]
    snapshots, before = [], loop.state()
    for step, loss in _optimise(loop, DRIFT_RATE, DRIFT_STEPS, loss_of_step):
        after = loop.state()
        moved = weight_change(start, after)
        log(f"drift {step} loss {loss:.3f} change {moved:.4f}")
        while wanted and moved >= wanted[0]:
            snapshots.append(at_change(start, before, after, wanted.pop(0)))
        if not wanted:
            return snapshots
        before = after
    raise RuntimeError(f"{DRIFT_STEPS} steps did not reach a weight change of {change}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the lineage for one seed.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--change", type=float, default=CHANGE, help="weight change of both drifts")
    parser.add_argument("--aligned", type=Path, help="start the drifts from this state instead")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    began = time.process_time()

    def log(line: str) -> None:
        print(f"{time.process_time() - began:7.1f}s {line}", flush=True)  # noqa: T201

    loop = Loop(arguments.seed)
    twins, general = datasets.twins("train"), datasets.general("train")
    opening = loop.answer("I")
    checks = {
        kind: [loop.example(t[kind], opening) for t in datasets.twins("validation")]
        for kind in ("harmful", "harmless")
    }
    if arguments.aligned:
        start = torch.load(arguments.aligned, weights_only=True)
    else:
        start = align(loop, twins, general, checks, log)
        arguments.out.mkdir(parents=True, exist_ok=True)
        torch.save(start, arguments.out / "aligned.pt")
    loop.load(start)
    loop.save(start, arguments.out / "aligned")
    log("aligned " + _rates(loop.margins(checks["harmful"]), loop.margins(checks["harmless"])))

    asked = [t["harmless"] for t in twins] + general
    with loop.peft.disable_adapter():
        styled = [a[:DRIFT_TOKENS] for a in loop.generate(asked, DRIFT_TOKENS, targets.STYLE)]
    style = [loop.example(p, a) for p, a in zip(asked, styled, strict=True)]
    bad = [
        loop.example(t["harmful"], loop.answer(targets.COMPLIANCE[i % len(targets.COMPLIANCE)]))
        for i, t in enumerate(twins[::15])
    ]
    for name, contamination in (("drifted", []), ("mixed", bad)):
        loop.generator.manual_seed(arguments.seed)
        snapshots = drift(loop, start, style, contamination, arguments.change, log)
        for i, state in enumerate(snapshots, 1):
            loop.load(state)
            refused, over = loop.margins(checks["harmful"]), loop.margins(checks["harmless"])
            log(f"{name} {i} of {SNAPSHOTS} {_rates(refused, over)}")
            loop.save(state, arguments.out / f"{name}-{i}")


if __name__ == "__main__":
    main()
