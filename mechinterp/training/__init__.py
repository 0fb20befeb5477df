"""Training loops that leave trajectories: directories of log-spaced checkpoints."""
