"""Ops on a key/value cache: attention over it, and writing to it."""
