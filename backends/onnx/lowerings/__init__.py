"""How each fxpress operator becomes ONNX, a family of operators a file; `table.LOWERINGS` is the only list."""
