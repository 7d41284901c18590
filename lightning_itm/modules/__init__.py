"""State: losses, metric, LightningModules."""
