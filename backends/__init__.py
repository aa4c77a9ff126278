"""Backends: what runs a rewritten program. `eager` is the oracle, `onnx` the CPU product."""
