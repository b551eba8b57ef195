"""From a base model to a chat model."""
