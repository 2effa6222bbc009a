"""One optimizer step, and what surrounds it; sees only dictionaries of arrays."""
