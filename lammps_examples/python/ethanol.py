"""Ethanol with an ASE calculator of one's own, GFN2-xTB: learn a potential, then run biased MD and plot u.

pip install 'ubmd[tblite]'; about 5 minutes on two cores.
"""

import matplotlib.pyplot as plt
from ase.build import molecule
from tblite.ase import TBLite

import ubmd

ethanol = molecule("CH3CH2OH")
settings = {"run_dir": "ethanol_run", "loop": {"labels": 48}}
run = ubmd.run(settings, TBLite(method="GFN2-xTB", verbosity=0), ethanol)

figure, axes = plt.subplots(layout="constrained")
for tau in (0.0, 0.25):
    trajectory = ubmd.biased_md(run.model, ethanol, md={"steps": 4000}, bias={"force": tau}, threshold=1.5)
    axes.plot(trajectory.time, trajectory.max_u, label=f"bias strength {tau}")
axes.set(xlabel="time (ps)", ylabel="largest atomic uncertainty (eV/Å)")
axes.legend()
figure.savefig("ethanol.png")
