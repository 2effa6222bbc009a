"""What training does to an image, with Pillow's operations: flips, jitter, policies."""
