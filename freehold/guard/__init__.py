"""Guardrails: policies on prompts, tool results and answers; text in, a verdict and what may be shown out."""
