"""Changes that training makes to an image, with Pillow's operations: flips, jitter, policies."""
