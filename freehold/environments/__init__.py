"""Tasks whose answers a program checks: single questions, tools with a state, and what asks and learns from them."""
