"""Makes `foreign.pkl`, `foreign.pt` and `easysteer_wire.json` with the tools that own the formats.

Run where steering-vectors 0.12.2 and torch are installed, and `vllm/steer_vectors/payloads.py` of
EasySteer's fork of vLLM (commit 6267ca0) lies beside this script as `payloads.py`:

    python tests/golden/make_foreign.py

The vectors are `arange` with signs, so that the tests can say them again.
"""

import json
import pickle
from base64 import b64encode
from pathlib import Path

import payloads
import torch
from steering_vectors import SteeringVector

HERE = Path(__file__).parent
WIDTH = 16


def row(layer: int) -> torch.Tensor:
    return (torch.arange(WIDTH) - 7.5) * (layer + 2) / 8


if __name__ == "__main__":
    vector = SteeringVector({layer: row(layer) for layer in (0, 2, -1)}, "decoder_block")
    (HERE / "foreign.pkl").write_bytes(pickle.dumps(vector))
    torch.save(SteeringVector({1: row(1).bfloat16()}, "mlp"), HERE / "foreign.pt")
    wire = payloads.DirectionVector({layer: row(layer) for layer in (2, 10, 11)}).to_wire()
    for entry in wire["tensors"].values():
        entry["data"] = b64encode(entry["data"]).decode()
    (HERE / "easysteer_wire.json").write_text(json.dumps(wire, indent=1) + "\n")
