"""Supervised fine-tuning of a base model to a chat model."""
