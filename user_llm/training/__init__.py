"""State, optimizer, step and the one train loop."""
