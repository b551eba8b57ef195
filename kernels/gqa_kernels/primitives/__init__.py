"""Pieces of kernels that two kernels share."""
