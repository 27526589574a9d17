"""The one training loop and its loss."""
