"""The active-learning loop: train, run biased replicas, select, label, repeat."""
