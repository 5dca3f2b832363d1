"""Watch a run: a listener gets every event as an object; afterwards the folder of the run has all of them."""

from ase.build import bulk
from ase.calculators.emt import EMT

import ubmd

settings = {
    "run_dir": "copper_run",
    "loop": {"labels": 28},
    "md": {"temperature": 600.0, "steps": 500, "replicas": 2},
    "training": {"epochs": 100},
}


def watch(event: ubmd.events.Event) -> None:
    """Called with every event; `ubmd schema events` lists the kinds and their fields."""
    match event:
        case ubmd.events.Epoch(epoch=epoch, valid_force_rmse_eV_per_A=error) if epoch % 50 == 0:
            print(f"epoch {epoch}: forces {error:.4f} eV/Å")
        case ubmd.events.ReplicaDone():
            print(f"replica {event.replica}: {event.stopped} after {event.steps} steps, max u {event.max_u:.3f} eV/Å")
        case ubmd.events.IterationDone(valid=errors):
            print(f"iteration {event.iteration}: {event.labels} labels, forces {errors.force_rmse:.4f} eV/Å")


run = ubmd.run(settings, EMT(), bulk("Cu", cubic=True), listener=watch, progress=False)
training = sum(e.seconds for e in run.events() if e.event == "stage_done" and e.stage == "train")
print(f"{run}; {training:.0f} s of training; last errors {run.history[-1].errors_on('valid')}")
