"""Decode steps, their state on the device, and sampling."""
