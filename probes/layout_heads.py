"""How attention heads lie inside projections: the table of fused and split layouts."""

from dataclasses import dataclass

from torch import Tensor, nn

from probes.layout_trace import Trace, linear_width
from probes.sites import Unsupported

Found = dict[str, tuple[str, str, "Split"]]


@dataclass(frozen=True)
class Split:
    """A view of the last axis and the part of it that belongs to one kind of head.

    `view` is the shape the last axis takes; `take` indexes that shape. What is taken has the
    axes (..., head, width) after merging, because heads are consecutive in every layout.
    """

    view: tuple[int, ...]
    take: tuple[slice, ...]
    n_heads: int
    width: int

    def read(self, tensor: Tensor) -> Tensor:
        """`[..., total]` to `[..., head, width]`."""
        lead = tensor.shape[:-1]
        taken = tensor.reshape(*lead, *self.view)[(..., *self.take)]
        return taken.reshape(*lead, self.n_heads, self.width)

    def write(self, tensor: Tensor, heads: Tensor) -> Tensor:
        """A copy of `tensor` with the heads replaced."""
        lead = tensor.shape[:-1]
        new = tensor.reshape(*lead, *self.view).clone()
        place = new[(..., *self.take)]
        place.copy_(heads.reshape(place.shape))
        return new.reshape(tensor.shape)


def plain(n_heads: int, width: int) -> Split:
    """Heads side by side and nothing else."""
    return Split((n_heads, width), (slice(None), slice(None)), n_heads, width)


def section(before: int, n_heads: int, width: int, total: int) -> Split:
    """Heads side by side after `before` other values, in a row of `total` values."""
    return Split((total,), (slice(before, before + n_heads * width),), n_heads, width)


def head_points(
    model: nn.Module, text, attention: str, projection: str, trace: Trace
) -> tuple[Found, dict[str, str]]:
    """Points of `head_out`, `q`, `k`, `v` of one attention module, and the parts it lacks."""
    module = model.get_submodule(attention)
    n_heads = _count(module, text)
    total = trace.input(projection).shape[-1]
    if total % n_heads:
        raise Unsupported(
            f"{projection} takes {total} values, which {n_heads} heads cannot share evenly"
        )
    width = total // n_heads
    found: Found = {"head_out": (projection, "input", plain(n_heads, width))}
    linear = {
        name: trace.output(f"{attention}.{name}").shape[-1]
        for name, child in module.named_modules()
        if name and linear_width(child) and trace.has(f"{attention}.{name}")
    }

    def put(part: str, name: str, split: Split) -> None:
        found[part] = (f"{attention}.{name}", "output", split)

    if "kv_b_proj" in linear:  # multi-head latent attention (DeepSeek)
        name = "q_b_proj" if "q_b_proj" in linear else "q_proj"
        put("q", name, plain(n_heads, linear[name] // n_heads))
    elif "q_proj" in linear:
        each = linear["q_proj"] // n_heads
        # twice the width: a gate for each head follows its query (Qwen3-Next)
        put("q", "q_proj", Split((n_heads, each), (slice(None), slice(0, width)), n_heads, width))
        if "k_proj" in linear:
            put("k", "k_proj", plain(linear["k_proj"] // width, width))
            # without a v_proj the keys' projection serves as values too (Gemma 4)
            value = "v_proj" if "v_proj" in linear else "k_proj"
            put("v", value, plain(linear[value] // width, width))
    elif "qkv_proj" in linear or "c_attn" in linear:  # [all q | all k | all v]
        name = "qkv_proj" if "qkv_proj" in linear else "c_attn"
        row = linear[name]
        n_kv = (row - total) // (2 * width)
        put("q", name, section(0, n_heads, width, row))
        put("k", name, section(total, n_kv, width, row))
        put("v", name, section(total + n_kv * width, n_kv, width, row))
    elif "query_key_value" in linear:
        for part, split in _interleaved(module, linear["query_key_value"], n_heads, width).items():
            put(part, "query_key_value", split)
    latent = (
        f"{type(module).__name__} unpacks keys and values of all tokens from a compressed latent "
        "at every step, so no projection gives them once per token"
    )
    refused = {
        part: latent
        if "kv_b_proj" in linear
        else f"{type(module).__name__} has no projection that gives {part} alone "
        f"(its linear maps are {', '.join(linear)})"
        for part in ("q", "k", "v")
        if part not in found
    }
    return found, refused


def _interleaved(module: nn.Module, row: int, n_heads: int, width: int) -> dict[str, Split]:
    """Fused projections that interleave the three kinds by head or by group of heads."""
    everything, one = slice(None), slice(None)
    if getattr(module, "new_decoder_architecture", False):  # Falcon 40B: [group][q ... q, k, v]
        groups = (row // width - n_heads) // 2
        per = n_heads // groups
        view = (groups, per + 2, width)
        kinds = {"q": slice(0, per), "k": slice(per, per + 1), "v": slice(per + 1, per + 2)}
        counts = {"q": n_heads, "k": groups, "v": groups}
        return {
            part: Split(view, (everything, kind, one), counts[part], width)
            for part, kind in kinds.items()
        }
    if row == (n_heads + 2) * width:  # Falcon 7B: all queries, then one key and one value
        view = (n_heads + 2, width)
        kinds = {
            "q": slice(0, n_heads),
            "k": slice(n_heads, n_heads + 1),
            "v": slice(n_heads + 1, n_heads + 2),
        }
        return {
            part: Split(view, (kind, one), n_heads if part == "q" else 1, width)
            for part, kind in kinds.items()
        }
    view = (n_heads, 3, width)  # GPT-NeoX, Bloom: [head][q, k, v]
    return {
        part: Split(view, (everything, slice(i, i + 1), one), n_heads, width)
        for i, part in enumerate(("q", "k", "v"))
    }


def _count(module: nn.Module, text) -> int:
    """Number of query heads: from the module where it says so, else from the configuration."""
    for name in ("num_heads", "num_attention_heads", "n_heads", "n_head"):
        if isinstance(count := getattr(module, name, None), int):
            return count
    try:  # some configurations raise on values that differ by layer
        return int(text.num_attention_heads)
    except (AttributeError, RuntimeError) as error:
        raise Unsupported(
            f"cannot tell the number of heads of {type(module).__name__}: {error}"
        ) from error
