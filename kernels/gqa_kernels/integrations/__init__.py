"""Adapters for other packages, one file each, imported on request only."""
