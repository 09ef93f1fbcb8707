"""Baked checkpoints in plain transformers, in this process and behind `transformers serve`."""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from probes.servers import post, serving
from steering.export.replays import Ids, Replay


class PlainTransformers:
    """`AutoModelForCausalLM.from_pretrained(folder).generate(...)`, float32, nothing of ours."""

    name = "transformers"
    version = transformers.__version__

    def __init__(self, folder: Path | str) -> None:
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=torch.float32
        ).eval()

    def replay(self, prompts: Sequence[Ids], n_tokens: int, steered: bool) -> list[Replay] | None:
        """Greedy answers with the logits of each token; None unsteered, for there is no such."""
        if not steered:
            return None
        made = []
        # sampling settings that the checkpoint ships are not to be taken over
        greedy = transformers.GenerationConfig(
            do_sample=False,
            max_new_tokens=n_tokens,
            min_new_tokens=None,
            return_dict_in_generate=True,
            output_logits=True,
            pad_token_id=0,
        )
        for prompt in prompts:
            ids = torch.tensor([prompt])
            with torch.no_grad():
                found = self.model.generate(
                    ids, attention_mask=torch.ones_like(ids), generation_config=greedy
                )
            tokens = tuple(found.sequences[0, len(prompt) :].tolist())
            made.append(Replay(prompt, tokens, logits=torch.cat(found.logits).float()))
        return made


class TransformersServe:
    """`transformers serve`, which gives text and no scores: tokens are compared."""

    name = "transformers serve"
    version = transformers.__version__

    def __init__(self, folder: Path | str, unsteered: Path | str | None = None) -> None:
        """`unsteered` is the folder of the model before, where it is to be asked as well."""
        self.folder = Path(folder).resolve()
        self.unsteered = None if unsteered is None else Path(unsteered).resolve()
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(self.folder))

    def replay(self, prompts: Sequence[Ids], n_tokens: int, steered: bool) -> list[Replay] | None:
        """Greedy answers. Raises `ValueError` for a prompt that does not survive being text."""
        folder = self.folder if steered else self.unsteered
        if folder is None:
            return None
        command = (
            shutil.which("transformers", path=str(Path(sys.executable).parent)) or "transformers"
        )
        line = [command, "serve", "--device", "cpu", "--dtype", "float32"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        with serving(line, environment=environment) as address:
            return [self._answer(address, folder, prompt, n_tokens) for prompt in prompts]

    def _answer(self, address: str, folder: Path, prompt: Ids, n_tokens: int) -> Replay:
        # the server's tokenizer puts a BOS before the text by itself, where it does that
        own = len(self.tokenizer("")["input_ids"])
        text = self.tokenizer.decode(list(prompt[own:]), skip_special_tokens=False)
        if tuple(self.tokenizer(text)["input_ids"]) != prompt:
            raise ValueError(
                "transformers serve takes text, and this prompt's tokens do not come back from "
                f"their text: {text[:80]!r}"
            )
        settings = {"do_sample": False, "max_new_tokens": n_tokens}
        body = {
            "model": str(folder), "prompt": text, "max_tokens": n_tokens,
            "generation_config": json.dumps(settings),
        }  # fmt: skip
        answer = post(f"{address}/v1/completions", body)["choices"][0]["text"]
        ids = tuple(self.tokenizer(text + answer)["input_ids"])
        if ids[: len(prompt)] != prompt:
            raise ValueError(
                "transformers serve gives text, and its answer joins the prompt's last token: give "
                f"a prompt that ends otherwise than {text[-20:]!r}"
            )
        return Replay(prompt, ids[len(prompt) :])
