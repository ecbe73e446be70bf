"""What a trained model gives: reconstructions, features, neighbours."""
