"""One file per paper. Start at `registry.py`."""
