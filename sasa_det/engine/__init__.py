"""How a training runs: hooks, and data-parallel processes on the CPU."""
