"""Exports on the Hugging Face Hub, with a card that says what one must know before using them.

Nothing here is needed offline: an export is a folder, and `card` writes its card without a network.
"""

import re
from pathlib import Path
from typing import Any

from probes import files
from steering.export.exports import Export, read_export
from steering.export.verdict import OUTCOMES, Verdict
from steering.offsets import HeadOffsets
from steering.sweep_result import SteeringSweep

NOT_MEASURED = (
    "**not measured**: whether it does more than a random vector of this norm is not known"
)


def card(
    exported: Export, sweep: SteeringSweep | None = None, verdict: Verdict | None = None
) -> str:
    """The model card: model, site, strength, effect beside its null, and the proof, in Markdown.

    `sweep` holds effect and null: its rows at the export's strength and unit are shown, and where
    there is none, or no sweep, the card says that the effect was not measured.
    """
    steering = exported.steering
    what, origin = steering.what, steering.what.origin
    places = (
        ", ".join(f"{layer}.head_out.{head}" for layer, head in what.heads)
        if isinstance(what, HeadOffsets)
        else ", ".join(map(str, what.sites))
    )
    unit = "" if exported.unit == "raw" else f" {exported.unit}"
    proof = "**not run**: see `alignlens verify`" if verdict is None else (
        f"{OUTCOMES[verdict.outcome]} in {verdict.consumer}, {verdict.n_prompts} prompts"
    )  # fmt: skip
    facts = {
        "Model": f"`{origin.model}`, fingerprint `{origin.fingerprint[:16]}`",
        "Sites": f"`{places}` (0-based blocks)",
        "Operation": "add" if isinstance(what, HeadOffsets) else what.operation,
        "Strength": f"{exported.strength:g}{unit}, multiplied into the file",
        "Tokens": exported.scope,
        "Estimated by": origin.estimator or "unknown",
        "For": f"{exported.target}, file `{exported.file}`",
        "Proven": proof,
    }
    rows = "\n".join(f"| {name} | {_cell(text)} |" for name, text in facts.items())
    return f"""---
library_name: alignlens
tags:
- steering-vector
- alignlens
- {exported.target}
{_base(origin.model)}---

# Steering for {origin.model}

| | |
|---|---|
{rows}

## Effect and null

{_effects(exported, sweep)}

## Use

`alignlens serve-args` prints the command that serves it, `alignlens verify` proves it where it runs.
`alignlens/source.safetensors` is what the file was made from.
"""


def push(
    folder: Path | str,
    repository: str,
    *,
    sweep: SteeringSweep | None = None,
    verdict: Verdict | None = None,
    private: bool = True,
) -> str:
    """Upload an export with its card to `org/name`; gives its address. A repository that is made
    for it is private unless said; one that exists stays as it is.

    Raises `ConnectionError` where the Hub cannot be reached; the card then lies in the folder.
    """
    exported = read_export(folder)
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise ValueError(f"{repository!r} is no name on the Hub: give org/name")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    files.write_text(exported.folder / "README.md", card(exported, sweep, verdict))
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(exported.folder))
    except (OSError, HfHubHTTPError) as error:
        raise ConnectionError(
            f"{repository} could not be uploaded ({error}): the export with its card is in "
            f"{exported.folder}"
        ) from error
    return f"https://huggingface.co/{repository}"


def pull(repository: str, revision: str | None = None) -> Export:
    """Fetch an export from the Hub into its cache; one that is there already needs no network.

    Raises `ConnectionError` where it can be had from neither, `ValueError` for a repository that
    holds no export.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(repository, revision=revision)
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ConnectionError(
            f"{repository} is neither on this machine nor reachable ({error})"
        ) from error
    try:
        return read_export(folder)
    except FileNotFoundError as error:
        raise ValueError(f"{repository} holds no export of this project") from error


def _effects(exported: Export, sweep: SteeringSweep | None) -> str:
    if sweep is None:
        return f"Effect: {NOT_MEASURED}."
    what = exported.steering.what
    shown = (
        set()
        if isinstance(what, HeadOffsets)
        else {(str(site), what.operation) for site in what.sites}
    )
    near = [
        i
        for i, (cell, strength) in enumerate(
            zip(sweep.cells, sweep.strengths.tolist(), strict=True)
        )
        if abs(strength - exported.strength) <= 1e-6 * abs(exported.strength)
        and (cell.site, cell.operation) in shown
    ]
    if sweep.unit != exported.unit or not near:
        return (
            f"Effect: {NOT_MEASURED}. The sweep given has strengths "
            f"{', '.join(f'{s:g}' for s in sorted(set(sweep.strengths.tolist())))} {sweep.unit}."
        )
    bottom, top = sweep.band
    lines = ["| site | measure | change | 95 % interval | null, 5 to 95 % | claimed |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for i in near:
        for m, name in enumerate(sweep.measures):
            null = (
                f"{bottom[i, m]:.3g} to {top[i, m]:.3g}" if bool(top[i, m] == top[i, m]) else "none"
            )
            lines.append(
                f"| {sweep.cells[i].site} | {_cell(name)} | {sweep.change[i, m]:.3g} | "
                f"{sweep.low[i, m]:.3g} to {sweep.high[i, m]:.3g} | {null} | "
                f"{'yes' if bool(sweep.claimed[i, m]) else 'no'} |"
            )
    kinds = sorted(set(sweep.kinds))
    lines.append(f"\n{len(sweep.kinds)} null vectors of equal norm: {', '.join(kinds) or 'none'}.")
    return "\n".join(lines)


def _cell(text: Any) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _base(model: str) -> str:
    """The Hub's own key for the model, where the vector's model is one on the Hub."""
    name = re.fullmatch(r"([\w.-]+/[\w.-]+)(@[\w.-]+)?", model)
    return "" if name is None or Path(model).exists() else f"base_model: {name.group(1)}\n"
