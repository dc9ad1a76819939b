"""Pure array functions used by two methods or more."""
