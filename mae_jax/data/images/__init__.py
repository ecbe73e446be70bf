"""An image file to pixels."""
