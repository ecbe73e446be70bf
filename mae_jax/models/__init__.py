"""The masked autoencoder as Flax modules, and the pure functions it is made of."""
