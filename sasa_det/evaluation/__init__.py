"""How well a detector does, what it costs and where it looks."""
