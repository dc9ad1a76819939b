"""Distillation of the networks whose weights are made here."""
