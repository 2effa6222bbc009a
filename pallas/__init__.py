"""Pallas kernels for the operations that XLA does badly. They know nothing of models."""
