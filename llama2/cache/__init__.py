"""What a model keeps of the tokens before: contiguous or in pages."""
