"""Generators of synthetic anomalies: pure functions of a key and one image, which jit and vmap on the device."""
