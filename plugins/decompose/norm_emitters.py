"""Emitters that write norms for compilers which know a norm by its nodes, or have one node for it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qwen_export.plugins.emitter import Emitter


class PowerEmitter(Emitter):
    """Norms as Pow, ReduceMean, Add, Sqrt, Div, Mul: ONNX Runtime and OpenVINO make one kernel of these, if the square is a Pow."""

    def mean_square_scale(self, x: ir.Value, eps: float) -> ir.Value:
        (square,) = self("", "Pow", [x, self.scalar(2.0)], like=x)
        (mean,) = self("", "ReduceMean", [square, self.ints(-1)], like=x, keepdims=1)
        (root,) = self("", "Sqrt", [self.add(mean, self.scalar(eps))], like=x)
        return self("", "Div", [x, root], like=x)[0]

    def unit_scale(self, x: ir.Value, D: int, scale: ir.Value, eps: float) -> ir.Value:
        """As a norm: x / sqrt(sum(x^2) + eps) is D^-1/2 x / sqrt(mean(x^2) + eps / D)."""
        weight = self.array(f"unit_{D}", np.full(D, D**-0.5, np.float32))
        return self.mul(self.rms_norm(x, weight, eps / D), scale)


class NodeEmitter(PowerEmitter):
    """Norms as RMSNormalization, of opset 23."""

    def rms_norm(self, x: ir.Value, weight: ir.Value, eps: float) -> ir.Value:
        return self("", "RMSNormalization", [x, weight], like=x, axis=-1, epsilon=eps, stash_type=1)[0]
