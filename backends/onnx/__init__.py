"""The ONNX backend: lowerings, export, measured choice between kernels, ONNX Runtime sessions."""
