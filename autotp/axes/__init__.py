"""Logical axes: terms and their unification, sharding rules, and the analysis that infers the axes of every value."""
