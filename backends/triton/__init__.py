"""The Triton backend: partition into kernels, generated code, launches."""
