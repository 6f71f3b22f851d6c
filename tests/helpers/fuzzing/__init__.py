"""A fuzzer of models: seeded calls of every head of every family, each judged against a plain reference."""
