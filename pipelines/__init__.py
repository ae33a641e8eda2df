"""Inference: stages, the cascade and pictures on disk."""
