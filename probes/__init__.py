"""Linear probes: solver, cross-validation, control tasks, transfer between checkpoints, erasure."""
