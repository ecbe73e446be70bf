"""What an encoder is worth: reconstructions, features, neighbours, classes, and their pictures."""
