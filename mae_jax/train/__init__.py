"""The pure training step: what it minimises, how it updates, and how it is compiled over devices."""
