"""Training recipes. They need the extra `models`: pip install gqa-kernels[models]."""
