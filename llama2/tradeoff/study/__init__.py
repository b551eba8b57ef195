"""What is trained and asked, and what the results can tell."""
