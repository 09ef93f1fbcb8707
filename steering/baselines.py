"""What LoFiT is compared with, trained by the same loop: other heads, all heads, LoRA.

`fit_offsets` takes heads from anywhere: `random_heads`, ITI's, or the largest offsets of a
training of all heads (`by_offset_norm`). What differs between two of these is the choice alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from probes import files
from probes.model import HookedModel
from probes.results import check_finite
from steering.lofit import Head, HeadTuning, all_heads, fit_offsets
from steering.offsets import HeadOffsets
from steering.preferences import Preference, apart
from steering.replay import CACHE_LIMIT
from steering.tuning import Task, Training, TrainingCurve, curve_fields, record_of, train


def random_heads(model: HookedModel, k: int, seed: int) -> tuple[Head, ...]:
    """`k` heads drawn without replacement, in forward order."""
    heads = all_heads(model.layout)
    if not 1 <= k <= len(heads):
        raise ValueError(f"{k} heads of {len(heads)} were asked for: ask for 1 to {len(heads)}")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(heads), generator=generator)[:k].tolist()
    return tuple(sorted(heads[i] for i in drawn))


def by_offset_norm(offsets: HeadOffsets, k: int) -> tuple[Head, ...]:
    """The `k` heads with the longest offsets; equal lengths by layer, then head."""
    if not 1 <= k <= len(offsets.heads):
        raise ValueError(f"{k} heads of {len(offsets.heads)} with offsets were asked for")
    return tuple(sorted(offsets.heads, key=lambda at: (-float(offsets[at].norm()), *at))[:k])


def fit_all_heads(
    model: HookedModel,
    examples: Sequence[Preference],
    *,
    training: Training | None = None,
    validation: Sequence[Preference] | None = None,
    cache_limit: int = CACHE_LIMIT,
    progress: bool = True,
) -> HeadTuning:
    """Bias tuning without a selection: an offset for every head, L * H * d_head numbers."""
    return fit_offsets(
        model,
        examples,
        all_heads(model.layout),
        training=training,
        validation=validation,
        estimator="bias tuning of all",
        cache_limit=cache_limit,
        progress=progress,
    )


@dataclass(frozen=True)
class LoraTuning:
    """A low-rank adapter and how its training went. `applied` puts it on a model."""

    adapter: Mapping[str, Tensor] = field(repr=False)
    """peft's tensors by its names."""
    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    """Names of the linear maps adapted, in every block."""
    curve: TrainingCurve

    @property
    def n_parameters(self) -> int:
        """Numbers in the adapter."""
        return sum(tensor.numel() for tensor in self.adapter.values())

    @contextmanager
    def applied(self, model: HookedModel) -> Iterator[None]:
        """While open, the model runs with the adapter; afterwards its modules are its own again.

        Needs the plain transformers engine, since adapters stand in the modules themselves.
        """
        from peft import set_peft_model_state_dict

        with _adapted(model, self.rank, self.alpha, self.dropout, self.targets, 0) as peft:
            report: Any = set_peft_model_state_dict(peft, dict(self.adapter))
            if unknown := getattr(report, "unexpected_keys", None):
                raise ValueError(
                    f"the adapter has tensors that {model.name} has no place for, for example "
                    f"{unknown[0]}: it belongs to another model"
                )
            peft.eval()
            yield

    def save(self, folder: Path | str) -> Path:
        """Write the curve, and the adapter as peft's own files, which its loader reads."""
        from safetensors.torch import save

        folder = self.curve.save(folder)
        tensors = {name: tensor.contiguous() for name, tensor in self.adapter.items()}
        path = folder / "adapter_model.safetensors"
        files.write_bytes(path, save(tensors, {"format": "pt"}))
        described = _config(self.rank, self.alpha, self.dropout, self.targets).to_dict()
        described = {
            key: sorted(value) if isinstance(value, set) else value
            for key, value in described.items()
        }
        described["inference_mode"] = True
        files.write_json(folder / "adapter_config.json", described)
        return folder

    @classmethod
    def load(cls, folder: Path | str) -> "LoraTuning":
        """Read what `save` wrote."""
        import json

        from safetensors.torch import load_file

        folder = Path(folder)
        curve = TrainingCurve.load(folder)
        said = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        return cls(
            load_file(folder / "adapter_model.safetensors"),
            said["r"],
            said["lora_alpha"],
            said["lora_dropout"],
            tuple(said["target_modules"]),
            curve,
        )

    def __str__(self) -> str:
        return f"LoRA of rank {self.rank} on {', '.join(self.targets)}: {self.curve}"


def fit_lora(
    model: HookedModel,
    examples: Sequence[Preference],
    *,
    rank: int = 8,
    alpha: float = 8.0,
    dropout: float = 0.1,
    targets: Sequence[str] = ("q_proj", "v_proj"),
    training: Training | None = None,
    validation: Sequence[Preference] | None = None,
    progress: bool = True,
) -> LoraTuning:
    """LoRA (Hu et al. 2022) through peft; the defaults are those LoFiT is compared with.

    Adapters stand in every block, so nothing is cached. Dropout acts in the adapters during
    training only. `Training.noise` is not used: peft starts B at 0 and draws A.
    """
    training = training or Training(lr=1e-3)
    apart(examples, validation or ())
    with _adapted(model, rank, alpha, dropout, targets, training.seed) as peft:
        parameters = [p for p in peft.parameters() if p.requires_grad]
        peft.eval()  # the reference and the check of the replay are those of the unmodified model
        task = Task(model, examples, training)
        held = None if validation is None else Task(model, validation, training)
        with torch.random.fork_rng():  # dropout draws from the global generator
            torch.random.manual_seed(training.seed)
            trained = train(
                parameters,
                task,
                training,
                validation=held,
                stepping=lambda: _dropping(peft),
                progress=progress,
            )
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(peft)
        adapter = {name: t.detach().float().cpu().clone() for name, t in sorted(state.items())}
        fields = curve_fields(trained, parameters, task)
    for name, tensor in adapter.items():
        check_finite(tensor, f"the trained adapter's {name}")
    settings = {"rank": rank, "alpha": alpha, "dropout": dropout, "targets": list(targets)}
    curve = TrainingCurve(**fields, record=record_of(model, task, training, **settings))
    return LoraTuning(adapter, rank, alpha, dropout, tuple(targets), curve)


def _config(rank: int, alpha: float, dropout: float, targets: Sequence[str]) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=dropout,
        target_modules=list(targets),
        task_type="CAUSAL_LM",
    )


@contextmanager
def _adapted(
    model: HookedModel,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Sequence[str],
    seed: int,
) -> Iterator[Any]:
    """The model with a fresh adapter in its modules, which are put back afterwards."""
    from peft import get_peft_model

    if model.engine.name != "transformers":
        raise ValueError(
            f"LoRA stands in the modules of a model, which the {model.engine.name} engine copies: "
            "load the model with engine='transformers'"
        )
    plain: Any = model.model
    wanted = [(p, p.requires_grad) for p in plain.parameters()]
    found = {name.rsplit(".", 1)[-1] for name, _ in plain.named_modules()}
    if missing := [name for name in targets if name not in found]:
        raise ValueError(
            f"{type(plain).__name__} has no modules named {', '.join(missing)}: give the names of "
            "its own projections as `targets`"
        )
    with torch.random.fork_rng():  # peft draws from the global generator
        torch.random.manual_seed(seed)
        peft = get_peft_model(plain, _config(rank, alpha, dropout, targets))
    try:
        yield peft
    finally:
        peft.unload()
        if hasattr(plain, "peft_config"):
            del plain.peft_config
        for p, before in wanted:
            p.requires_grad_(before)


@contextmanager
def _dropping(peft: Any) -> Iterator[None]:
    """Dropout in the adapters and nowhere else."""
    layers = [m for n, m in peft.named_modules() if ".lora_dropout." in n]
    try:
        for layer in layers:
            layer.train()
        yield
    finally:
        for layer in layers:
            layer.eval()
