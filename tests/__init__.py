"""The type checker that the suite runs every function of jaxad under; an int is a float, as Python's typing rules say."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
