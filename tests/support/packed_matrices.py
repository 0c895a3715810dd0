"""The quantized matrices of a bundle, as they are in its file of weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx


def stored_bytes(bundle: Path, file: str = "decoder.onnx") -> dict[str, npt.NDArray[np.uint8]]:
    """Every packed matrix of the bundle, by the name of its initializer, read from the file of weights."""
    found = {}
    for tensor in onnx.load(bundle / file, load_external_data=False).graph.initializer:
        if tensor.data_type == onnx.TensorProto.UINT8:
            place = {entry.key: entry.value for entry in tensor.external_data}
            raw = np.fromfile(bundle / place["location"], np.uint8, int(place["length"]), offset=int(place["offset"]))
            found[tensor.name] = raw.reshape(tensor.dims)
    return found
