"""The numbers that mark positions of a packed batch; data, losses and the training loop read them."""

IGNORE = -100
"""Target of a position that carries no loss."""
PADDING = -1
"""Document number of a position that is padding."""
