"""Updates that LoRA adapters make, as two thin factors that are never multiplied out."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from probes.results import check_finite

_PREFIX = "base_model.model."
_PLAIN = {
    "use_dora": "DoRA rescales the columns of the sum",
    "modules_to_save": "it replaces whole modules",
    "trainable_token_indices": "it replaces rows of the embedding",
    "target_parameters": "it adapts parameters of fused experts",
    "lora_bias": "it trains biases of its own",
    "use_bdlora": "its factors are block-diagonal",
    "use_qalora": "its inputs are pooled in groups",
    "alora_invocation_tokens": "it is switched on by tokens",
    "layer_replication": "it copies layers",
    "monteclora_config": "its factors are sampled",
    "arrow_config": "it routes between adapters",
}
"""Settings under which the update is not simply scale * B A, and why."""


@dataclass(frozen=True)
class LowRank:
    """A matrix in factored form, `left @ right`. Rank 0 stands for a matrix of zeros."""

    left: Float[Tensor, "m r"]
    right: Float[Tensor, "r n"]

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    def dense(self) -> Float[Tensor, "m n"]:
        """The matrix multiplied out: for writing a checkpoint, and for tests."""
        return self.left @ self.right

    def minus(self, other: "LowRank") -> "LowRank":
        """The difference, its factors put side by side: ranks add, nothing is multiplied."""
        return LowRank(torch.cat([self.left, -other.left], 1), torch.cat([self.right, other.right]))

    @classmethod
    def zeros(cls, m: int, n: int) -> "LowRank":
        return cls(torch.zeros(m, 0, dtype=torch.float64), torch.zeros(0, n, dtype=torch.float64))


def read_lora(folder: Path | str) -> tuple[dict[str, LowRank], str]:
    """The update of each weight that an adapter changes, by the weight's name, in float64, and
    the name of the base that the adapter says it belongs to.

    The scale (`lora_alpha / r`, or `/ sqrt(r)` for rank-stabilised LoRA, with the adapter's
    patterns) is in the left factor. Kinds of adapter whose update is not B A are refused.
    """
    from peft import LoraConfig
    from safetensors.torch import load_file

    folder = Path(folder)
    files = [folder / "adapter_config.json", folder / "adapter_model.safetensors"]
    if not all(file.is_file() for file in files):
        raise ValueError(
            f"{folder} is no LoRA adapter: it needs adapter_config.json and "
            "adapter_model.safetensors"
        )
    settings = json.loads(files[0].read_text())
    _check_kind(folder.name, settings)
    known = LoraConfig.__dataclass_fields__
    config = LoraConfig(**{key: value for key, value in settings.items() if key in known})
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(files[1]).items():
        module, _, factor = key.removeprefix(_PREFIX).partition(".lora_")
        factor = factor.removesuffix(".weight")
        if factor not in ("A", "B", "embedding_A", "embedding_B") or tensor.dim() != 2:
            raise ValueError(
                f"the adapter {folder.name} holds {key!r} of shape {tuple(tensor.shape)}, which is "
                "no factor of a LoRA of matrices: merge it into its model and give the folder"
            )
        check_finite(tensor, f"{key} of the adapter {folder.name}")
        found.setdefault(module, {})[factor] = tensor.double()
    return {
        f"{module}.weight": _update(module, factors, config, folder.name)
        for module, factors in found.items()
    }, str(settings.get("base_model_name_or_path") or "")


def _check_kind(name: str, settings: Mapping[str, Any]) -> None:
    if settings.get("peft_type") != "LORA":
        raise ValueError(
            f"the adapter {name} is of kind {settings.get('peft_type')}, expected LORA: merge it "
            "into its model and give the folder"
        )
    odd = [why for key, why in _PLAIN.items() if settings.get(key)]
    if settings.get("bias", "none") != "none":
        odd.append("it trains biases")
    if odd:
        raise ValueError(
            f"the adapter {name} is more than a low-rank update ({'; '.join(odd)}): merge it into "
            "its model and give the folder"
        )


def _update(module: str, factors: dict[str, Tensor], config: Any, name: str) -> LowRank:
    from peft.utils.other import get_pattern_key

    embedding = "embedding_A" in factors
    A, B = (factors.get(("embedding_" if embedding else "") + side) for side in "AB")
    if A is None or B is None or A.shape[0] != B.shape[1]:
        raise ValueError(
            f"the adapter {name} has no matching pair of factors for {module}: its file is damaged"
        )
    alphas = config.alpha_pattern
    alpha = alphas.get(get_pattern_key(alphas.keys(), module), config.lora_alpha)
    r = A.shape[0]
    B = B * (alpha / (r**0.5 if config.use_rslora else r))
    # embeddings, and the Conv1D of GPT-2, keep their weight transposed
    return LowRank(A.T, B.T) if embedding or config.fan_in_fan_out else LowRank(B, A)
