"""The driver: tracing, the pass pipeline, reports, artefacts and the command line."""
