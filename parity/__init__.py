"""A PyTorch reference of the masked autoencoder, and the comparison of mae_jax with it, stage by stage."""
