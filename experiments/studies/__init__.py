"""Studies of questions that no recipe answers."""
