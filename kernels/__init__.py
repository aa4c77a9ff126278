"""Triton kernels, a family a file: the kernel, the function that launches it, shapes in their docstrings."""
