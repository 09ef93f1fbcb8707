"""Tensors as vllm-lens sends them: base64 of their bytes, compressed with zstd."""

import base64
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

_BITS = {"torch.bfloat16": torch.bfloat16, "torch.float16": torch.float16,
         "torch.float32": torch.float32, "torch.float64": torch.float64}  # fmt: skip


def decode(wire: Any, most: int = 2**28) -> Float[Tensor, "..."]:
    """The tensor in its own dtype; the older form without compression is read too.

    No more is unpacked than its shape announces, and no more than `most` values. Raises
    `ValueError` for anything else.
    """
    import zstandard

    try:
        shape = [int(n) for n in wire["shape"]]
        count = int(np.prod(shape, dtype=object)) if shape else 1
        if min(shape, default=0) < 0 or len(shape) > 3 or count > most:
            raise ValueError(f"its shape is {shape}")
        dtype = np.dtype(str(wire["dtype"]))
        if dtype.name not in ("float16", "float32", "float64", "int16"):
            raise ValueError(f"its type is {dtype.name}")
        raw = base64.b64decode(wire["data"], validate=True)
        compression = wire.get("compression")
        if compression not in (None, "zstd"):
            raise ValueError(f"its compression is {compression!r}")
        wanted = count * dtype.itemsize
        if compression:
            said = zstandard.frame_content_size(raw)
            if said not in (-1, wanted):
                raise ValueError(f"{said} bytes are packed, its shape needs {wanted}")
            raw = zstandard.ZstdDecompressor().decompress(raw, max_output_size=max(wanted, 1))
        if len(raw) != wanted:
            raise ValueError(f"it has {len(raw)} bytes, its shape needs {wanted}")
        values = torch.frombuffer(bytearray(raw), dtype=getattr(torch, dtype.name))
        original = wire.get("original_dtype") or f"torch.{dtype.name}"
        if original not in _BITS or (dtype.name == "int16") != (original == "torch.bfloat16"):
            raise ValueError(f"it is {original} carried as {dtype.name}")
        return values.view(_BITS[original]).reshape(shape)
    except (KeyError, TypeError, ValueError, AttributeError, zstandard.ZstdError) as error:
        raise ValueError(f"this is no tensor of vllm-lens: {error}") from error
