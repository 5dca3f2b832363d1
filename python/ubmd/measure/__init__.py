"""What is measured: errors against labels, coverage, torsions, isomers, volumes, correlation times."""
