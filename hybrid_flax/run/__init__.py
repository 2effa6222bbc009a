"""What a run leaves in its work directory, and what it survives."""
