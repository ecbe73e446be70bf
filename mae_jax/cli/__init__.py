"""The commands of `mae-jax`, a function each, and what they share. Frameworks are imported inside, for quick help."""
