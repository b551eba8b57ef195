"""What stands around a launch: checks, layouts, launch numbers, registration."""
