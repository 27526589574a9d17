"""Scores of experts, and models made from others: pruned, grown, or turned from dense layers to experts."""
