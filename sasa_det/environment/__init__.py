"""What is installed, and whether sasa_det can stand on it."""
