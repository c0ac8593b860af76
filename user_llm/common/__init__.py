"""Trees, meshes, checkpoints and metric logs. Knows nothing of users or text."""
