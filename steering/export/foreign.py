"""Steering vectors of other tools, read as `SteeringVector`s.

No file read here says which model it is for, so each reader takes the `Origin` of the model, and
holds width and layers against it. Rows that are all zero are left out, and the estimator in the
origin says how many; NaN is refused. What a file does not say and would change where a vector
acts is asked for, never guessed. Template and positions of the origin are cleared: files do not
say them. Formats were read from each project's source.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from probes.results import check_finite
from probes.sites import Site
from steering.artefact import Origin
from steering.export.pickles import StandIn, load_restricted
from steering.vector import SteeringVector

MAX_TEXT = 1 << 28
"""Largest `.svec` that is read, in bytes."""

NORMED_OR_SCALED = frozenset(
    "afmoe exaone4 flex_olmo gemma2 gemma3 gemma3n gemma4 glm4 glm4v granite granitemoe "
    "granitemoehybrid granitemoeshared olmo2 olmo3 olmo_hybrid".split()
)
"""Architectures that norm or scale what attention and MLP give before they add it to the stream."""

_TYPES = {"decoder_block": "resid_post", "self_attn": "attn_out", "mlp": "mlp_out"}


def from_steering_vectors(path: Path | str, origin: Origin) -> SteeringVector:
    """A pickled `SteeringVector` of the package steering-vectors (read at 0.12.2).

    That package hooks module outputs, blocks counted from 0 or from the end. The output of a
    decoder block is `resid_post`, of attention `attn_out`, of an MLP `mlp_out`. The latter two
    only where the module's output is added to the stream as it is: where a norm or a factor
    follows (Gemma 2 and 3, OLMo 2, GLM-4, Granite), the vector belongs before it and no site of
    ours does, so it is refused. The same for norms (`input_layernorm`, `post_attention_layernorm`).
    An origin without `model_type` is taken to add as it is.
    """
    found = load_restricted(path)
    state = found.state if isinstance(found, StandIn) else found
    if not isinstance(state, dict) or not isinstance(state.get("layer_activations"), dict):
        raise ValueError(
            f"{path} holds no SteeringVector of steering-vectors but {_kind(found)}: expected one "
            "pickled whole, or its attributes layer_activations and layer_type as a dict"
        )
    kind = state.get("layer_type")
    if not isinstance(kind, str) or kind not in _TYPES:
        shown = repr(kind[:40]) if isinstance(kind, str) else _kind(kind)
        raise ValueError(
            f"{path} steers the layer type {shown}, the output of a module that is not added to "
            f"the stream: vectors of {', '.join(_TYPES)} can be read; train one of those"
        )
    architecture = origin.model_type.removesuffix("_text")
    if kind != "decoder_block" and architecture in NORMED_OR_SCALED:
        raise ValueError(
            f"{path} adds to the output of {kind}, and {architecture} norms or scales that before "
            "it joins the stream, so it is no vector of a site here: train one of decoder_block"
        )
    rows = {}
    for layer, value in state["layer_activations"].items():
        if type(layer) is not int:
            raise ValueError(f"a layer of {path} is named by {_kind(layer)}: expected numbers")
        site = Site(layer, _TYPES[kind]).resolve(origin.n_layers)
        if site in rows:
            raise ValueError(f"{path} has layer {site.layer} twice, counted from both ends")
        tensor = _tensor(value, f"layer {layer} of {path}")
        if tensor.numel() != origin.d_model:
            raise _width(f"layer {layer} of {path}", tensor, origin)
        rows[site] = tensor.reshape(-1)
    return _made(path, origin, rows, "steering-vectors", f"vectors of steering-vectors ({kind})")


def from_svec(
    path: Path | str,
    origin: Origin,
    *,
    location: Literal["layer_output", "layer_input"] | None = None,
    operation: Literal["add", "ablate"] = "add",
) -> SteeringVector:
    """A `.svec` of AISteer360: JSON with `[K, width]` directions by layer, `model_type` checked.

    The file does not say the boundary, so `location` must: `layer_output` gives `resid_post`,
    `layer_input` `resid_pre`. K = 1 is a vector to add; with `operation="ablate"` K rows are a
    subspace to remove. A `layer_output` of the last block was read after the final norm there
    (`hidden_states`), and the origin records it.
    """
    if location not in ("layer_output", "layer_input"):
        raise ValueError(
            f"{path} does not say at which boundary its directions act (location={location!r}): "
            "give location='layer_output' (CAA, directional ablation; the default of fits) or "
            "location='layer_input' (ActAdd, angular steering, CAST)"
        )
    if operation not in ("add", "ablate"):
        raise ValueError(f"operation {operation!r}: directions of AISteer360 are 'add' or 'ablate'")
    data = _json(path)
    directions, kind = data.get("directions"), data.get("model_type")
    if not isinstance(directions, dict) or not isinstance(kind, str):
        raise ValueError(f"{path} is no .svec: expected an object with model_type and directions")
    if origin.model_type and kind.removesuffix("_text") != origin.model_type.removesuffix("_text"):
        raise ValueError(
            f"{path} is for the architecture {kind[:60]!r}, {origin.model} is {origin.model_type}: "
            "make vectors on this model; if they are of the same text model, clear the origin's "
            "model_type with dataclasses.replace"
        )
    if data.get("num_heads") is not None or data.get("head_dim") is not None:
        raise ValueError(
            f"{path} holds directions of single heads (ITI), which are HeadOffsets here: fit them "
            "with steering.iti, or build HeadOffsets from its rows"
        )
    part = "resid_post" if location == "layer_output" else "resid_pre"
    rows = {}
    for name, value in directions.items():
        if not (name.isascii() and name.isdecimal() and str(int(name)) == name):
            raise ValueError(f"a layer of {path} is called {name[:40]!r}: expected a number from 0")
        where = f"layer {name} of {path}"
        tensor = _tensor(_numbers(value, where), where)
        tensor = tensor[None] if tensor.ndim == 1 else tensor
        if tensor.shape[-1] != origin.d_model:
            raise _width(where, tensor, origin)
        if operation == "add" and len(tensor) != 1:
            raise ValueError(
                f"{where} has {len(tensor)} directions, and one vector is added: ActAdd keeps one a "
                "token, angular steering a plane; average or choose rows and write one, or give "
                "operation='ablate' to remove them as a subspace"
            )
        site = Site(int(name), part).resolve(origin.n_layers)
        rows[site] = tensor
    normed = Site(origin.n_layers - 1, "resid_post") in rows
    return _made(path, origin, rows, "AISteer360", "directions of a .svec", normed, operation)


def from_persona_vectors(
    path: Path | str, origin: Origin, layer: int | None = None
) -> SteeringVector:
    """A tensor `[n_layers + 1, width]` of persona_vectors, its rows indexed like `hidden_states`.

    Row i is the output of block i - 1, row 0 the embedding; `layer` is the number that project
    gives a layer, so the row. Without it, rows 1 to n_layers - 1 are read, as `resid_post` of
    blocks 0 to n_layers - 2. The last row was read after the final norm: it is read only when
    `layer` names it, and the origin then says `final_norm`. Row 0, when named, is `0.resid_pre`.
    """
    n = origin.n_layers
    tensor = _tensor(load_restricted(path), f"the tensor in {path}")
    if tensor.ndim != 2 or len(tensor) != n + 1:
        raise ValueError(
            f"{path} holds a tensor of shape {list(tensor.shape)}, expected [{n + 1}, "
            f"{origin.d_model}]: the embedding and the outputs of {n} blocks, as persona_vectors "
            "saves them; read other tensors with from_block_tensor, which asks for their layers"
        )
    if tensor.shape[1] != origin.d_model:
        raise _width(f"the tensor in {path}", tensor, origin)
    if layer is not None and not 0 <= layer <= n:
        raise ValueError(f"layer {layer} of {path}: expected a row, 0 (embedding) to {n}")
    wanted = range(1, n) if layer is None else (layer,)
    rows = {_hidden_state(row, n): tensor[row] for row in wanted}
    said = "persona vectors" if layer is None else f"persona vector, row {layer}"
    return _made(path, origin, rows, "persona_vectors", said, layer == n)


def from_block_tensor(
    path: Path | str,
    origin: Origin,
    layers: int | Sequence[int],
    *,
    convention: Literal["block_output", "hidden_states"] | None = None,
) -> SteeringVector:
    """A bare tensor in a `.pt` or `.safetensors`: `[width]` at each of the layers, or one row each.

    `convention` says what a layer's number means: `block_output` counts blocks from 0 and means
    the block's output; `hidden_states` counts like transformers, j >= 1 the output of block j - 1,
    0 the embedding, and the last of them after the final norm, which the origin records.
    """
    if convention not in ("block_output", "hidden_states"):
        raise ValueError(
            f"{path} does not say what a layer's number means (convention={convention!r}): give "
            "convention='block_output' (3 is the output of block 3) or convention='hidden_states' "
            "(3 is hidden_states[3], the output of block 2)"
        )
    n, numbers = origin.n_layers, [layers] if isinstance(layers, int) else list(layers)
    last = n if convention == "hidden_states" else n - 1
    if not numbers or len(set(numbers)) != len(numbers):
        raise ValueError(f"layers {numbers}: name each layer of {path} once")
    if any(not 0 <= number <= last for number in numbers):
        raise ValueError(
            f"layers {numbers} of {path}: {convention} of {origin.model} are 0 to {last}"
        )
    tensor = _tensor(_bare(path), f"the tensor in {path}")
    if tensor.ndim > 2 or (tensor.ndim == 2 and len(tensor) != len(numbers)):
        raise ValueError(
            f"{path} holds a tensor of shape {list(tensor.shape)} for {len(numbers)} layers: "
            f"expected [{origin.d_model}] or [{len(numbers)}, {origin.d_model}]"
        )
    if tensor.shape[-1:] != (origin.d_model,):
        raise _width(f"the tensor in {path}", tensor, origin)
    each = tensor if tensor.ndim == 2 else tensor.expand(len(numbers), -1)
    hidden = convention == "hidden_states"
    sites = [_hidden_state(j, n) if hidden else Site(j, "resid_post") for j in numbers]
    rows = dict(zip(sites, each, strict=True))
    return _made(
        path, origin, rows, "unknown", f"bare tensor ({convention})", hidden and n in numbers
    )


def _hidden_state(index: int, n_layers: int) -> Site:
    return Site(index - 1, "resid_post") if index else Site(0, "resid_pre")


def _bare(path: Path | str) -> Any:
    if Path(path).suffix != ".safetensors":
        return load_restricted(path)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as opened:
            names = list(opened.keys())
            if len(names) != 1:
                raise ValueError(f"{path} holds {len(names)} tensors, expected one")
            return opened.get_tensor(names[0])
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or is damaged: {error}") from error


def _json(path: Path | str) -> dict[str, Any]:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.stat().st_size > MAX_TEXT:
        raise ValueError(f"{path} has more than {MAX_TEXT} bytes: no .svec is that large")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("it says one name twice")
        return dict(pairs)

    try:
        data = json.loads(path.read_bytes(), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no .svec: {str(error)[:200]}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} is no .svec: expected a JSON object, found {_kind(data)}")
    return data


def _numbers(value: Any, what: str) -> Tensor:
    try:
        # float(): JSON's true would count as 1, and numbers in quotes as numbers
        rows = value if value and isinstance(value[0], list) else [value]
        if not all(type(x) in (int, float) for row in rows for x in row):
            raise TypeError
        return torch.tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, OverflowError, IndexError, KeyError) as error:
        raise ValueError(f"{what} is no list of numbers, or of rows of equal length") from error


def _tensor(value: Any, what: str) -> Tensor:
    """The values as float32; NaN, infinity and whole numbers are refused."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.array(value))
    if not isinstance(value, Tensor):
        raise ValueError(f"{what} is {_kind(value)}: expected a tensor")
    if not value.is_floating_point():
        raise ValueError(f"{what} has dtype {value.dtype}: expected floating-point numbers")
    made = value.detach().float()
    check_finite(made, what)
    return made


def _made(
    path: Path | str,
    origin: Origin,
    rows: dict[Site, Tensor],
    producer: str,
    estimator: str,
    final_norm: bool = False,
    operation: str = "add",
) -> SteeringVector:
    found = {site: row.reshape(-1, row.shape[-1]) for site, row in rows.items()}
    # indexing with a mask copies, so rows of one file share no memory
    kept = {site: row[row.any(dim=1)] for site, row in found.items()}
    left_out = sum(map(len, found.values())) - sum(map(len, kept.values()))
    if not any(map(len, kept.values())):
        raise ValueError(f"{path} holds no vector: all of its {left_out} rows are zero")
    if left_out:
        estimator += f", {left_out} all-zero rows left out"
    vectors = {site: row[0] if len(row) == 1 else row for site, row in kept.items() if len(row)}
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:32]
    said = replace(
        origin,
        template_hash="",
        positions="",
        data_hash=digest,
        estimator=estimator,
        weight_processing="none",
        final_norm=final_norm,
        producer=producer,
    )
    return SteeringVector(vectors, said, operation)


def _width(what: str, tensor: Tensor, origin: Origin) -> ValueError:
    return ValueError(
        f"{what} has shape {list(tensor.shape)}, but {origin.model} has width {origin.d_model}: the "
        "vectors are another model's"
    )


def _kind(value: Any) -> str:
    # never the value itself: what a pickle makes may be endless to print
    return f"a {type(value).__name__}"
