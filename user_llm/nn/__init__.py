"""Building blocks: arrays in, arrays out. No users, no text, no files."""
