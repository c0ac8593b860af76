"""What is trained: `build(config, ...)` of each module returns a `Task`."""
