"""Evaluation of trained models: bits per byte of text, lm-eval."""
