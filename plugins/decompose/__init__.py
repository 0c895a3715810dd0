"""The ops of domain qwen as graphs of standard ONNX operators with static shapes: what every target without a kernel of its own shares."""
