"""Loading a folder as anyone would, and what of it was not loaded."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from steering.export.repackage import flags_for


@dataclass(frozen=True)
class Loading:
    """What `AutoModelForCausalLM.from_pretrained` made of a folder, by names of weights."""

    architecture: str
    """Name of the class that was loaded."""
    missing: tuple[str, ...] = ()
    """Weights of the class that the files lack; they are filled with random or default values."""
    unexpected: tuple[str, ...] = ()
    """Weights in the files that the class has no place for; they are left out."""
    mismatched: tuple[str, ...] = ()
    """Weights whose shape in the files is another than that of the class."""
    errors: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    """Settings that would keep the biases among `unexpected`; empty where none would."""

    @property
    def biases(self) -> tuple[str, ...]:
        """Biases in the files that are not loaded, and a constant that was baked into them."""
        return tuple(name for name in self.unexpected if name.endswith("bias"))

    @property
    def clean(self) -> bool:
        """Everything in the files is loaded, and nothing is lacking there."""
        return not (self.missing or self.unexpected or self.mismatched or self.errors)

    def __str__(self) -> str:
        if self.clean:
            return f"{self.architecture} loads every weight of the files and lacks none"
        parts = []
        if self.biases:
            fix = (
                "no setting of this class keeps them, so it is not the one they were written for"
                if not self.flags
                else "set " + " and ".join(f'"{flag}": true' for flag in self.flags) + " in "
                "config.json"
            )
            parts.append(
                f"leaves out {_count(self.biases, 'bias', 'biases')}, and an offset baked into "
                f"them with it: {fix}"
            )
        others = tuple(name for name in self.unexpected if name not in self.biases)
        for names, what in (
            (others, "leaves out {} that it has no place for"),
            (self.missing, "lacks {} in the files and fills them with values of its own"),
            (self.mismatched, "finds {} of another shape"),
        ):
            if names:
                parts.append(what.format(_count(names, "weight", "weights")))
        parts += [f"reports: {error.splitlines()[0]}" for error in self.errors]
        return f"{self.architecture} " + "; it ".join(parts)


def check_loading(folder: Path | str) -> Loading:
    """Load the folder with plain transformers and say what is lost or lacking on the way.

    The case to find: a configuration that lost the setting for biases (`mlp_bias`). The biases are
    then left out with a line in a report, and the model runs as if it had never been steered.
    Takes the memory of the model in the dtype of its files.
    """
    return load(folder, "auto")[1]


def load(folder: Path | str, dtype: torch.dtype | str) -> tuple[Any, Loading]:
    """The model in a folder, in evaluation mode on the CPU, and the report of its loading."""
    import transformers

    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json: give the folder of a checkpoint")
    with quiet():
        pair: Any = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below and not raised
            local_files_only=True,
            trust_remote_code=False,
        )
    model, found = pair
    loading = Loading(
        type(model).__name__,
        tuple(sorted(found["missing_keys"])),
        tuple(sorted(found["unexpected_keys"])),
        tuple(sorted(str(name) for name, *_ in found["mismatched_keys"])),
        tuple(found["error_msgs"]),
    )
    if loading.biases:
        wanted = {*model.state_dict(), *loading.biases}
        flags = flags_for(type(model), model.config, wanted) or ()
        loading = Loading(**{**vars(loading), "flags": flags})
    return model.eval(), loading


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, and no report of transformers' own beside the one given back."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _count(names: tuple[str, ...], one: str, many: str) -> str:
    called = f"1 {one} ({names[0]})"
    return called if len(names) == 1 else f"{len(names)} {many} (first {names[0]})"
