"""The comparison of somebody else's port: any Flax module with any PyTorch module, layer by layer."""
