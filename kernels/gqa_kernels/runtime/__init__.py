"""What a launch needs besides the kernel: checks, layouts, launch configurations, registration."""
