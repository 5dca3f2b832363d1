"""The kinds of potentials, one folder each, and what they share: predictions, model files, evaluation."""
