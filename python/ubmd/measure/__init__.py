"""What is measured: errors, coverage, torsions, isomers, volumes, correlation times; crystals: phonons, elasticity."""
