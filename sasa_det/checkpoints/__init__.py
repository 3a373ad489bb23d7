"""Reading checkpoints safely, and saying whether they fit a model."""
