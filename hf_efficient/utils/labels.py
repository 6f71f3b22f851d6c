"""Labels as transformers' losses take them."""

IGNORE_INDEX = -100  # of positions without a target
