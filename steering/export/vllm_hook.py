"""One vector for IBM's vLLM-Hook: a configuration and the `.pt` that it names.

Read at v0, commit 631b0f9 of 2026-05-05 (`workers/steer_activation_worker.py`). The worker adds
`coefficient * dir` to what `model.layers.<optimal_layer>` gives, at every token; where vLLM fuses
the residual sum, to its residual half, which is the same for a sum. What it cannot do:

- several blocks: there is one `optimal_layer`;
- vectors inside a request: `vector_path` is read on the server, once, when the model is loaded;
- other tokens than all, or other strengths in one server: the switch is a file;
- models whose blocks are not called `model.layers` (GPT-2): it hooks nothing and goes on;
- ablation: its method `adjust_rs` computes the projection from the residual half alone, which is
  not the stream in models with a fused residual sum, so it is not offered here.
"""

import io
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from probes import files
from probes.results import check_finite
from probes.sites import Unsupported


def write_vllm_hook(
    folder: Path | str,
    offsets: Mapping[int, Float[Tensor, " d_model"]],
    coefficient: float = 1.0,
    *,
    vector_path: str | None = None,
) -> Path:
    """Write `steering.json` (for `config_file`) and `vector.pt`; gives the path of the former.

    One block only, several are refused. `vector_path` is where the server finds the `.pt`; without
    it, the absolute path of the file just written. The `.pt` holds `{"dir": float32 [d_model]}`.
    """
    if len(offsets) != 1:
        raise Unsupported(
            f"vLLM-Hook steers one block, these are vectors of {len(offsets)}: choose one with "
            "`vector.at('12.resid_post')`, or export to EasySteer or vllm-lens"
        )
    ((layer, vector),) = offsets.items()
    if layer < 0 or vector.ndim != 1:
        raise ValueError(
            f"block {layer}, shape {list(vector.shape)}: expected one vector [d_model]"
        )
    check_finite(vector, f"the vector at block {layer}")
    if not math.isfinite(coefficient) or coefficient == 0:
        raise ValueError(f"coefficient {coefficient}: expected a finite number other than 0")
    folder = Path(folder)
    tensor = folder / "vector.pt"
    buffer = io.BytesIO()
    torch.save({"dir": vector.detach().cpu().float().clone()}, buffer)
    files.write_bytes(tensor, buffer.getvalue())
    steering = {
        "method": "add_vector",
        "coefficient": float(coefficient),
        "optimal_layer": layer,
        "vector_path": vector_path or str(tensor.resolve()),
        "apply_at_all_positions": True,
    }
    path = folder / "steering.json"
    files.write_json(path, {"steering": steering})
    return path
