"""Evaluation of trained models: bits per byte of text, recall, lm-eval."""
