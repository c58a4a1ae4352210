"""Command line, benchmarks and evaluation: what people run."""
