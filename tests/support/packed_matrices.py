"""The quantized matrices of a bundle, and their scales, as they are in its file of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx


def stored_bytes(bundle: Path, file: str = "decoder.onnx", kind: int = onnx.TensorProto.UINT8) -> dict[str, npt.NDArray[Any]]:
    """Every tensor of an element type, by default packed matrices, by the name of its initializer, read from the file of weights."""
    found = {}
    for tensor in onnx.load(bundle / file, load_external_data=False).graph.initializer:
        if tensor.data_type == kind:
            place = {entry.key: entry.value for entry in tensor.external_data}
            element = onnx.helper.tensor_dtype_to_np_dtype(kind)
            raw = np.fromfile(bundle / place["location"], np.uint8, int(place["length"]), offset=int(place["offset"])).view(element)
            found[tensor.name] = raw.reshape(tensor.dims)
    return found
