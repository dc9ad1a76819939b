"""Synthetic anomalies, drawn on the device."""
