"""Devices, meshes, and being asked to stop."""
