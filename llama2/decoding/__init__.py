"""One step of generation, its state on the device and the choice of a token."""
