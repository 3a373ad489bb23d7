"""What runs a training: hooks, and data-parallel processes on the CPU."""
