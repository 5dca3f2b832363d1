"""Settings of MD and of its bias."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ubmd.devices import Device
from ubmd.settings.marks import NOTHING
from ubmd.settings.table import Table


class MDRampSettings(Table):
    """Temperature and pressure that change linearly over the first iterations and then stay."""

    iterations: int = Field(5, ge=1, description="iterations until the last values are reached; they hold from then on")
    temperature: tuple[float, float] | None = Field(
        None, description="first and last temperature of all replicas, K, e.g. [300.0, 600.0]"
    )
    pressure: tuple[float, float] | None = Field(
        None, description="first and last pressure of all replicas, MPa, e.g. [0.0, 250.0]"
    )

    @model_validator(mode="after")
    def _temperatures_are_positive(self) -> MDRampSettings:
        _check_each("md.ramp.temperature", self.temperature or (), above=0.0)
        return self


class MDSettings(Table):
    """The replicas' dynamics in LAMMPS (NVT: fix nve + fix langevin; NPT: fix npt, Nosé-Hoover)."""

    replicas: int = Field(8, ge=1, description="independent replicas per iteration")
    steps: int = Field(20000, ge=1, description="maximum steps of one replica")
    timestep: float = Field(0.5, gt=0, description="time step of the dynamics, fs")
    ensemble: Literal["nvt", "npt"] = Field(
        "nvt", description="nvt: the cell, if any, stays as it is; npt: a barostat moves it (periodic structures only)"
    )
    temperature: float = Field(300.0, gt=0, description="temperature of the thermostat, K")
    temperatures: tuple[float, ...] = Field(
        (), description="temperatures that the replicas take in turn, K; default: 'temperature' for all"
    )
    damping: float = Field(
        0.51,
        gt=0,
        description="damping time of the thermostat, ps (Langevin in nvt: friction 1.96 /ps = 0.51 ps; "
        "Nosé-Hoover in npt, where 0.1 is usual)",
    )
    pressure: float = Field(0.0, description="pressure of the barostat (npt), MPa; negative: tension")
    pressures: tuple[float, ...] = Field(
        (),
        description="pressures that the replicas take in turn (npt), MPa, e.g. [250.0, -250.0] for one half each; "
        "default: 'pressure' for all",
    )
    pressure_damping: float = Field(1.0, gt=0, description="damping time of the barostat (npt), ps")
    coupling: Literal["iso", "aniso", "tri"] = Field(
        "tri",
        description="what the barostat moves (npt): iso the volume, aniso the three lengths along the axes of LAMMPS, "
        "tri lengths and angles",
    )
    cell_limit: float = Field(
        2.5,
        gt=1,
        description="a replica fails when its volume, or a length in any direction, has grown or shrunk by more than "
        "this factor, for npt (no unit)",
    )
    ramp: MDRampSettings | None = Field(None, description="temperature and pressure that change over iterations")
    frames_every: int = Field(200, ge=1, description="steps between frames that go to the pool")
    trace_every: Annotated[int | None, NOTHING] = Field(
        None,
        ge=1,
        description="steps between records of positions, cell and largest uncertainty in a file beside the frames, for "
        "autocorrelation times (10 fs or less); a multiple of bias.every; default: none",
    )
    colvars: Path | None = Field(
        None,
        description="file with a Colvars configuration (LAMMPS: fix colvars), another bias that acts on the dynamics "
        "of every replica from its first step on, e.g. metadynamics; relative to the settings file; default: none",
    )
    precision: Literal["mixed", "single", "double"] = Field(
        "mixed", description="precision of pair_style ubmd (models that run in one precision only keep it)"
    )
    device: Annotated[Device, NOTHING] = Field(
        "cpu",
        description="where pair_style ubmd runs the model: cpu, cuda (the first GPU; the MPI ranks of a replica take "
        "the GPUs in turn) or cuda:n (GPU number n, from 0)",
    )
    ranks: int = Field(
        1, ge=1, description="MPI processes that share one replica's atoms; more than 1 pays off for thousands of atoms"
    )
    together: Annotated[int | None, NOTHING] = Field(
        None,
        ge=1,
        description="replicas that one worker runs at once and evaluates together, which is faster for small "
        "structures; 1: one after the other; default: all of a worker's, up to 512 atoms in all",
    )
    timeout: Annotated[float, NOTHING] = Field(7200.0, gt=0, description="time limit of one replica, s")
    start_from: Literal["start", "labelled"] = Field(
        "start", description="replicas start from the first structure, or from newly labelled ones"
    )

    @model_validator(mode="after")
    def _conditions_fit(self) -> MDSettings:
        _check_each("md.temperatures", self.temperatures, above=0.0)
        ramp = self.ramp or MDRampSettings()
        for name in ("temperature", "pressure"):
            if getattr(self, f"{name}s") and getattr(ramp, name):
                raise ValueError(f"md.{name}s and md.ramp.{name} cannot both be set; remove one of them")
        if self.ensemble == "nvt" and (self.pressure or self.pressures or ramp.pressure):
            raise ValueError("a pressure needs a barostat: set md.ensemble = 'npt'")
        return self


class BiasRampSettings(Table):
    """Bias strengths that change linearly over the first iterations and then stay."""

    iterations: int = Field(5, ge=1, description="iterations until the last values are reached; they hold from then on")
    force: tuple[float, float] | None = Field(
        None, description="first and last bias.force (no unit), e.g. [0.1, 0.25]; replaces bias.force"
    )
    stress: tuple[float, float] | None = Field(
        None, description="first and last bias.stress (no unit); replaces bias.stress"
    )

    @model_validator(mode="after")
    def _strengths_are_not_negative(self) -> BiasRampSettings:
        _check_each("bias.ramp.force", self.force or (), least=0.0)
        _check_each("bias.ramp.stress", self.stress or (), least=0.0)
        return self


class BiasSettings(Table):
    """The uncertainty bias (fix ubmd); force = 0 and stress = 0 run plain MD with the uncertainty as a monitor."""

    force: float = Field(0.25, ge=0, description="tau, bias strength as a share of the physical forces (no unit)")
    stress: float = Field(
        0.0, ge=0, description="bias strength as a share of the physical stress, for md.ensemble = 'npt' (no unit)"
    )
    uncertainty: Literal["energy", "atomic"] = Field(
        "energy",
        description="what the bias raises: the uncertainty of the total energy, or the sum of all atomic ones (stays "
        "strong above about 1000 atoms)",
    )
    species: dict[str, float] = Field(
        default_factory=dict, description="per-element factors on tau (no unit), e.g. {H = 0.0}"
    )
    window: int = Field(100, ge=1, description="evaluations in the moving window of the bias scale")
    every: int = Field(
        4,
        ge=1,
        description="steps between evaluations of uncertainty and bias; times md.timestep at most 2.9 fs if H is "
        "biased, 5 fs for C, N, O",
    )
    ramp: BiasRampSettings | None = Field(None, description="bias strengths that change over iterations")

    @property
    def is_biased(self) -> bool:
        """Whether any replica of any iteration feels a bias."""
        ramp = self.ramp or BiasRampSettings()
        return any(x > 0.0 for x in (*(ramp.force or (self.force,)), *(ramp.stress or (self.stress,))))

    @property
    def has_stress(self) -> bool:
        """Whether any replica of any iteration feels a bias stress."""
        return any(x > 0.0 for x in ((self.ramp and self.ramp.stress) or (self.stress,)))


def _check_each(name: str, values: Sequence[float], above: float | None = None, least: float | None = None) -> None:
    """ValueError if one of several values is out of range."""
    for value in values:
        if (above is not None and not value > above) or (least is not None and not value >= least):
            limit = f"greater than {above:g}" if above is not None else f"at least {least:g}"
            raise ValueError(f"every value of {name} must be {limit}, not {value:g}")
