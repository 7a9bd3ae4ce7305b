"""Logical axes: terms, their unification, sharding rules, and the analysis that infers the axes of values."""
