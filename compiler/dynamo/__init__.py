"""The backend of torch.compile: what dynamo gives becomes a Program, and ONNX Runtime, Triton or PyTorch runs it."""
