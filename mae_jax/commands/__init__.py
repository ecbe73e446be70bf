"""The commands of `mae-jax`, a function each. Frameworks are imported inside them: help must answer at once."""
