"""Local folders and object storage."""
