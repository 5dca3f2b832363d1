"""The Gaussian-moment neural network: descriptor, network, gradient features, training, model file."""
