"""What a trained model can: bits of text, recall."""
