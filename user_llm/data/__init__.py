"""From raw files to batches: numpy in, dicts of arrays out."""
