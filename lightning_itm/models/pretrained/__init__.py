"""What all models that others have trained need: their learned scale, adapters, and parts that stay as they are."""
