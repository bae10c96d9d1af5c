"""Inference without a web framework: manifest, store, runtimes, pipeline, batcher."""
