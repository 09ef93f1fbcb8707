import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)

import tiny  # noqa: E402

from probes import HookedModel  # noqa: E402


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, so that nothing remembered decides a test."""
    monkeypatch.setenv("ALIGNLENS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tokenizer() -> Any:
    return tiny.tokenizer()


@pytest.fixture
def bos_tokenizer() -> Any:
    return tiny.tokenizer(bos=True)


@pytest.fixture
def llama() -> HookedModel:
    """A tiny Llama with a tokenizer and a chat template."""
    return tiny.hooked("llama")


@pytest.fixture(scope="session")
def base() -> HookedModel:
    """SmolLM2-135M-Instruct, converted once into the user's cache."""
    return HookedModel.load("builtin:base", device="cpu")


@pytest.fixture
def engine_calls(monkeypatch: pytest.MonkeyPatch) -> Callable[[HookedModel], list[tuple[int, int]]]:
    """Count the reads of a model: gives the list to which each read adds (rows, columns)."""

    def count(model: HookedModel) -> list[tuple[int, int]]:
        calls: list[tuple[int, int]] = []
        read = model.engine.read

        def counting(batch: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(tuple(batch.ids.shape))
            return read(batch, *args, **kwargs)

        monkeypatch.setattr(model.engine, "read", counting)
        return calls

    return count
