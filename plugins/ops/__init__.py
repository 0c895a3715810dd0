"""The ops: equation, shapes, eager body, fake, ONNX schema."""
