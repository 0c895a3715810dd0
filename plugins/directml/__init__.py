"""What DirectML can run."""
