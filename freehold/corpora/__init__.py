"""What the shipped recipes read: readers of single packages, and generators; found by entry points, as a user's are."""
