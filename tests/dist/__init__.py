"""Several ranks in one test session."""
