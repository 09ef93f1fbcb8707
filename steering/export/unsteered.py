"""The unsteered model as files that other programs load, made once and kept in the cache."""

import os
import subprocess
import sys
from pathlib import Path

from probes import files, names
from probes.model import HookedModel
from steering.export.llama_cpp import HOME, llama_cpp_home


def plain_folder(model: HookedModel) -> Path:
    """A folder that holds just this model: its own, or one written to the cache."""
    try:
        name = names.parse(model.name)
        if name.local and not name.adapter and not name.gguf:
            return Path(name.base)
    except (ValueError, OSError):  # a model made in memory has no such name
        pass
    kept = files.cache_dir() / "folders" / model.fingerprint
    if not kept.is_dir():
        from steering.export.checkpoint import bake

        bake(model, None, kept)
    return kept


def float32_gguf(source: HookedModel | Path | str, path: Path | str | None = None) -> Path:
    """A float32 GGUF by llama.cpp's own converter, so that nothing of a check is rounding.

    `source` is a model, then kept in the cache unless a path is given, or a checkpoint's folder.
    Raises `RuntimeError` with the converter's words where it does not know the architecture or the
    tokenizer.
    """
    if isinstance(source, HookedModel):
        path = path or files.cache_dir() / "gguf" / f"{source.fingerprint}.gguf"
        if Path(path).is_file():
            return Path(path)
    if path is None:
        raise ValueError("converting a folder needs a path for the GGUF")
    home = llama_cpp_home()
    if home is None:
        raise RuntimeError(
            "llama.cpp's converter is not here: run `make serve-llamacpp`, or name its folder in "
            f"{HOME}; or give a float32 GGUF of the model (--gguf-model)"
        )
    folder = plain_folder(source) if isinstance(source, HookedModel) else Path(source)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    script = home / "source" / "convert_hf_to_gguf.py"
    line = [sys.executable, script, folder, "--outfile", temporary, "--outtype", "f32"]
    environment = {**os.environ, "PYTHONPATH": str(home / "source" / "gguf-py")}
    try:
        done = subprocess.run(
            list(map(str, line)), capture_output=True, text=True, env=environment, check=False
        )
        if done.returncode or not temporary.is_file():
            words = [w for w in (done.stderr or done.stdout).splitlines() if w.strip()]
            raise RuntimeError(f"llama.cpp's converter: {words[-1] if words else 'no output'}")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
