"""Force-constant potentials of crystals: cluster basis, Bayesian regression, triggers, convergence."""
