"""Force constants of a crystal: basis, regression with Bayesian errors, phonons, model file."""
