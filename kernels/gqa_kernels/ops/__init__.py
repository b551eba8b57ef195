"""One file, or one folder, per op. No op imports another."""
