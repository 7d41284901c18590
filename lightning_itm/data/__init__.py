"""What a batch is, and which pairs come together."""
