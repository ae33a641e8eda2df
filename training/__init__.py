"""Training: data, cache, steps, the loop."""
