"""Muon and AdamW, the schedule, and expert balancing."""
