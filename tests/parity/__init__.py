"""Whole methods against implementations that are not ours.

For every method, `golden/<method>.npz` holds what another implementation gives: its maps, loss, gradients, parameters
after some steps, scores and heat maps, with the inputs, or weights drawn by `golden.synthetic`. `<method>.py` beside it
says which implementation, and computes the same with jaxad. Where the other implementation is on PyPI,
`make/<method>.py` writes the file; else the docstring names the repository, its commit and what was called.

A method may have more than one file: `<method>.npz` and `<method>-<part>.npz`.
"""
