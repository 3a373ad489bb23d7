"""The installed packages, and whether sasa_det supports them."""
