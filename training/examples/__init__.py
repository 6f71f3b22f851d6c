"""Short programs for users."""
