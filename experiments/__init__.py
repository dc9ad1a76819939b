"""Recipes, benchmarks and studies; each runs from the root of the checkout, as `python -m experiments.run`."""
