"""The model that trains the lineage: a frozen lower half, run once, and low-rank adapters above.

Layers below the first adapted one never change, so their output is computed once per example; the
system prompt all examples share runs once per step and its keys and values serve the whole batch.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from probes import files
from probes.engines.modes import expanded
from probes.lineage.base import base_folder

FIRST_LAYER = 10
RANK, ALPHA = 8, 16

State = dict[str, Tensor]


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
