"""Alignment: Base and conversations to Preview."""
