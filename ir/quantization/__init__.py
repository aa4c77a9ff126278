"""The numerics of quantization as pure functions on tensors: weights on a grid, ranges and scales of activations."""
