"""Weights between Flax modules, plain dictionaries, checkpoints and releases."""
