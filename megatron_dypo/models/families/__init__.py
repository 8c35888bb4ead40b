"""Name tables, one for each model family."""
