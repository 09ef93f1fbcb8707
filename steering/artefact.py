"""The file a steering vector or a set of head offsets is kept in, and what it says of its model.

One safetensors file. Tensors are float32, named by their site (`12.resid_post`,
`7.head_out.3`); everything else is string metadata, so that any safetensors reader shows what the
vectors are. Nothing is pickled, and a file that is damaged, foreign or of another format is
refused with a reason.
"""

import dataclasses
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from probes import files
from probes.model import HookedModel
from probes.results import check_finite
from probes.sites import Site

FORMAT = 1
"""Version of the artefact; another version is refused."""


@dataclass(frozen=True)
class Origin:
    """The model that vectors belong to, and how they were made."""

    model: str
    """Name as given when the vectors were made."""
    fingerprint: str
    n_layers: int
    d_model: int
    n_heads: int
    """Query heads; 0 for a model without attention."""
    n_kv_heads: int
    head_dim: int
    revision: str = ""
    template_hash: str = ""
    estimator: str = ""
    data_hash: str = ""
    """Hash over the prompts the vectors were estimated from."""
    positions: str = ""
    """Tokens whose activations they were estimated from (`probes.positions`)."""
    weight_processing: str = "none"
    """What was done to the weights before activations were read: none, folded or centred."""
    final_norm: bool = False
    """Whether activations of the last block were read after the final norm."""
    producer: str = ""
    model_type: str = ""
    """Architecture, as in the configuration of the text model; empty in files that do not say."""

    @classmethod
    def of(
        cls,
        model: HookedModel,
        *,
        estimator: str = "",
        data_hash: str = "",
        positions: str = "",
    ) -> "Origin":
        """The origin of vectors made on this model now."""
        _, _, revision = model.name.partition("@")
        return cls(
            model.name,
            model.fingerprint,
            *_sizes_of(model),
            revision=revision,
            template_hash=model.template.hash if model.tokenizer is not None else "",
            estimator=estimator,
            data_hash=data_hash,
            positions=positions,
            producer=f"alignlens {importlib.metadata.version('alignlens')}",
            model_type=_type_of(model),
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes that two models must share for a vector of one to fit into the other."""
        return self.n_layers, self.d_model, self.n_heads, self.n_kv_heads, self.head_dim

    def check(self, model: HookedModel) -> None:
        """Refuse a model of another architecture or other sizes; another checkpoint of the same
        model is welcome. Vectors that do not say their architecture are held to the sizes."""
        here, kind = _sizes_of(model), _type_of(model)
        if here != self.shape or self.model_type not in ("", kind):
            raise ValueError(
                f"the vectors come from {self.model} ({_said(self.model_type, self.shape)}), the "
                f"model given is {model.name} ({_said(kind, here)}): make vectors on this model or "
                "a checkpoint of it"
            )

    def same_model(self, other: "Origin", doing: str) -> None:
        """Refuse to combine vectors of models of other architectures or sizes."""
        types = {self.model_type, other.model_type} - {""}
        if self.shape != other.shape or len(types) > 1:
            raise ValueError(
                f"cannot {doing} vectors of {self.model} ({_said(self.model_type, self.shape)}) "
                f"and of {other.model} ({_said(other.model_type, other.shape)}): they belong to "
                "different models"
            )


def _sizes_of(model: HookedModel) -> tuple[int, int, int, int, int]:
    layers = model.layout.supported("head_out")
    block = model.layout.blocks[layers[0]] if layers else None
    heads = block.heads["head_out"] if block else 0
    n_kv = block.heads.get("k", heads) if block else 0
    width = block.widths["head_out"] if block else 0
    return model.n_layers, model.d_model, heads, n_kv, width


def _type_of(model: HookedModel) -> str:
    """Of the text model, so that a language model taken out of a multimodal one is the same."""
    return model.model.config.get_text_config().model_type  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]


def _said(model_type: str, shape: tuple[int, ...]) -> str:
    layers, width, heads, n_kv, head = shape
    return (
        f"{model_type or 'architecture unknown'}, {layers} layers, width {width}, {heads} heads "
        f"of {head}, {n_kv} key-value heads"
    )


def write(
    path: Path | str, kind: str, origin: Origin, tensors: Mapping[str, Tensor], extra: dict
) -> Path:
    """Write the artefact at once or not at all; `extra` holds JSON values by name."""
    from safetensors.torch import save

    metadata = {"format_version": str(FORMAT), "kind": kind}
    metadata |= {name: str(value) for name, value in dataclasses.asdict(origin).items()}
    metadata |= {name: json.dumps(value, sort_keys=True) for name, value in extra.items()}
    path = Path(path)
    # copies, because one tensor may stand at several sites and the format takes none twice
    named = {name: tensor.detach().cpu().float().clone() for name, tensor in tensors.items()}
    named = {name: tensor.contiguous() for name, tensor in named.items()}
    files.write_bytes(path, _in_order(save(named, metadata)))
    return path


def _in_order(blob: bytes) -> bytes:
    """The same file with its metadata sorted: safetensors writes them in a hash map's order, another
    at every call, so that equal vectors would be different bytes."""
    length = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + length])
    said = dict(sorted(header.pop("__metadata__").items()))
    text = json.dumps({"__metadata__": said, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + blob[8 + length :]


def read(path: Path | str, kind: str) -> tuple[Origin, dict[str, Tensor], dict[str, Any]]:
    """What `write` wrote: origin, tensors, and the extra values."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: give the file of a saved {kind}")
    try:
        with safe_open(path, "pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or is damaged: {error}") from error
    found, version = metadata.pop("kind", None), metadata.pop("format_version", None)
    if found != kind:
        raise ValueError(
            f"{path} holds {'no alignlens artefact' if found is None else f'a {found}'}, expected "
            f"a {kind}: files of other tools are read by their importers"
        )
    if version != str(FORMAT):
        raise ValueError(f"{path} has format {version}, this version reads {FORMAT}")
    metadata.setdefault("model_type", "")  # the first files of this format do not have it
    try:
        values = {}
        for field in dataclasses.fields(Origin):
            text = metadata.pop(field.name)
            values[field.name] = (
                text == "True" if field.type is bool else int(text) if field.type is int else text
            )
        extra = {name: json.loads(text) for name, text in metadata.items()}
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged: its metadata lack or garble {error}") from error
    for name, tensor in tensors.items():
        check_finite(tensor, f"{name} in {path}")
    return Origin(**values), tensors, extra


def check_vector(site: Site, vector: Tensor, origin: Origin, what: str) -> None:
    """Refuse a vector that cannot stand at this site: width, layer, head, NaN, all zero."""
    if not 0 <= site.layer < origin.n_layers:
        site.resolve(origin.n_layers)
        raise ValueError(f"site {site} of {what}: give layers counted from 0")
    headed = site.head is not None
    most = origin.n_kv_heads if site.part in ("k", "v") else origin.n_heads
    if site.head is not None and site.head >= most:
        raise ValueError(
            f"site {site} of {what} is out of range: {origin.model} has {most} heads of "
            f"{site.part}, 0 to {most - 1}"
        )
    width = origin.head_dim if headed else origin.d_model
    if vector.shape[-1] != width and not (headed and site.part != "head_out"):
        raise ValueError(
            f"the vector at {site} of {what} has width {vector.shape[-1]}, but {origin.model} has "
            f"{width} there"
        )
    check_finite(vector, f"the vector at {site} of {what}")
    if not bool(vector.any()):
        raise ValueError(
            f"the vector at {site} of {what} is all zero: it would change nothing; leave the site "
            "out, or check the contrast it was made from"
        )
