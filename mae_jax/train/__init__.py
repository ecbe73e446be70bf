"""The pure training step and what wraps it: engines, checkpoints, metrics, the loop."""
