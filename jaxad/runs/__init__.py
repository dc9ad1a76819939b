"""Run directories, and what is done in them: fitting, evaluating, scoring."""
