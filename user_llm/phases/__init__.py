"""What is trained. `build(name, run, data)` of pretrain_lm, pretrain_encoder and contextualize returns the `Task` of a phase."""
