"""com.microsoft.MatMulNBits as a function of standard operators, in the graph file itself: a runtime that has no kernel of that name runs
its body. ONNX Runtime has one, and takes it.

The body rounds no activations: `accuracy_level` permits that, it does not demand it."""

from __future__ import annotations

import onnx.parser
import onnx_ir as ir

from qwen_export.graphs.passes.pass_context import MICROSOFT, PassContext
from qwen_export.graphs.passes.pass_outcome import Outcome

PRODUCT = "MatMulNBits"

# B u8[N, K/block, block * bits / 8] has 8 / bits codes in a byte, the first in the low bits; zero_points u8[N, ceil(K/block * bits / 8)]
# likewise. Without zero_points, zero is the middle of the codes. An operator that takes the input or not makes one tensor of both cases:
# scale -1 times (0 - zero_points).
_TEXT = """
<domain: "com.microsoft", opset_import: ["" : OPSET]>
MatMulNBits <K, N, bits, block_size, accuracy_level> (A, B, scales, zero_points) => (Y) {
    one = Constant <value = int64[1] {1}> ()
    last = Constant <value = int64[1] {-1}> ()
    byte = Constant <value = int64[1] {8}> ()
    bits_scalar = Constant <value_int: int = @bits> ()
    bits_vector = Reshape (bits_scalar, one)
    k_scalar = Constant <value_int: int = @K> ()
    k = Reshape (k_scalar, one)
    n_scalar = Constant <value_int: int = @N> ()
    n = Reshape (n_scalar, one)
    block_scalar = Constant <value_int: int = @block_size> ()
    block = Reshape (block_scalar, one)
    blocks = Div (k, block)

    zero = Constant <value = int64 {0}> ()
    step = Constant <value = int64 {1}> ()
    byte_scalar = Constant <value = int64 {8}> ()
    in_byte = Div (byte_scalar, bits_scalar)
    places = Range (zero, in_byte, step)
    shifts_wide = Mul (places, bits_scalar)
    shifts = Cast <to = 12> (shifts_wide)
    bits_unsigned = Cast <to = 12> (bits_scalar)
    one_unsigned = Constant <value = uint32 {1}> ()
    count = BitShift <direction = "LEFT"> (one_unsigned, bits_unsigned)
    count_wide = CastLike (count, scales)
    two = Constant <value = float {2.0}> ()
    two_like = CastLike (two, scales)
    middle = Div (count_wide, two_like)

    bytes = Cast <to = 12> (B)
    bytes_apart = Unsqueeze (bytes, last)
    shifted = BitShift <direction = "RIGHT"> (bytes_apart, shifts)
    codes_unsigned = Mod (shifted, count)
    codes_flat = CastLike (codes_unsigned, scales)
    code_shape = Concat <axis = 0> (n, blocks, block)
    codes = Reshape (codes_flat, code_shape)

    block_bits = Mul (blocks, bits_vector)
    seven = Constant <value = int64[1] {7}> ()
    rounded_up = Add (block_bits, seven)
    zero_bytes = Div (rounded_up, byte)
    zero_shape = Concat <axis = 0> (n, zero_bytes)
    no_codes = ConstantOfShape <value = uint8[1] {0}> (zero_shape)
    minus = ConstantOfShape <value = float[1] {-1.0}> (zero_shape)
    given_zeros = DequantizeLinear <axis = 1, block_size = 1> (no_codes, minus, zero_points)
    given_bytes = Cast <to = 12> (given_zeros)
    given_apart = Unsqueeze (given_bytes, last)
    given_shifted = BitShift <direction = "RIGHT"> (given_apart, shifts)
    given_codes = Mod (given_shifted, count)
    given_wide = CastLike (given_codes, scales)
    row_shape = Concat <axis = 0> (n, last)
    given_rows = Reshape (given_wide, row_shape)
    start = Constant <value = int64[1] {0}> ()
    given_blocks = Slice (given_rows, start, blocks, one)
    has_zeros = OptionalHasElement (zero_points)
    zeros = Where (has_zeros, given_blocks, middle)

    block_shape = Concat <axis = 0> (n, blocks, one)
    zeros_apart = Reshape (zeros, block_shape)
    scales_apart = Reshape (scales, block_shape)
    centered = Sub (codes, zeros_apart)
    scaled = Mul (centered, scales_apart)
    matrix_shape = Concat <axis = 0> (n, k)
    matrix = Reshape (scaled, matrix_shape)
    turned = Transpose <perm = [1, 0]> (matrix)
    Y = MatMul (A, turned)
}
"""


def nbits_function(opset: int) -> ir.Function:
    """The function for graphs of an opset, 21 or later."""
    return ir.serde.deserialize_function(onnx.parser.parse_function(_TEXT.replace("OPSET", str(opset))))


def define_nbits(model: ir.Model, context: PassContext) -> Outcome:
    """Given  a lowered graph with com.microsoft.MatMulNBits
    Result the same, and the function in the model"""
    if not any(node.domain == MICROSOFT and node.op_type == PRODUCT for node in model.graph):
        return Outcome.nothing("nothing is quantized")
    function = nbits_function(context.opset)
    model.functions[function.identifier()] = function
    return Outcome(1)
