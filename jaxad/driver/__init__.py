"""The driver: the only place with loops over data, classes, meshes, checkpoints and progress."""
