"""What is learned in pretraining; encoders are known by the protocol of a base model only."""
