"""The graph language: operators, programs, patterns, printing, verification and the meaning of equal."""
