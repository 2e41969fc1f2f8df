"""What makes a run exact, fast and safe. Nothing here imports a script or a registry."""
