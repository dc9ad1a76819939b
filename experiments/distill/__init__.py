"""Distillation: how the embedded backbone and the teachers of Uninformed Students are trained."""
