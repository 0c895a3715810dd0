"""Checkpoints by their names on a hub: `Qwen/Qwen3.5-0.8B` instead of a directory.
Only the files that a build reads are downloaded, and only headers of weights for `inspect`.
"""
