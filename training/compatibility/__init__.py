"""What works with what: each family with each library that its models are given to, executed at tiny size."""
