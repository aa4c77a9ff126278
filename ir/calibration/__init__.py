"""Running calibration data through a program, and what is fitted to it: shared by quantization and pruning."""
