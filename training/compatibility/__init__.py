"""A matrix of what works with what: each family with each library that its models are given to, at tiny size."""
