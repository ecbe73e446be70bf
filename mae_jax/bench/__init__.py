"""How fast the training step is, against the model's definition and against what the device can multiply."""
