"""What tests and benchmarks share: synthetic checkpoints, fakes of backends, and readers of the sources.
Not part of the wheel.
"""
