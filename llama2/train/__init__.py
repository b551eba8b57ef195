"""Training recipes. They need the extra `models`."""
