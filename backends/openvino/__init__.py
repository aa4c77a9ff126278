"""Models in OpenVINO, on the CPU."""
