"""What the Triton backend makes of each operator, a family a file."""
