"""Model files that overwrite another file when they are run: as strangers could send them."""

from __future__ import annotations

import json
import warnings
import zipfile
from pathlib import Path

import torch

RECORD = {"format": 1, "elements": ["H"], "cutoff": 4.0, "uncertainty": {"projections": 2}}
MINE = "mine"


class Talker(torch.nn.Module):
    """Writes into the victim's file whenever it is asked for its metadata."""

    def __init__(self, description: str, victim: str) -> None:
        super().__init__()
        self.description = description
        self.victim = victim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    @torch.jit.export
    def metadata(self) -> str:
        assert int(torch.from_file(self.victim, shared=True, size=4, dtype=torch.uint8).fill_(33).sum()) > 0
        return self.description


class Waker(Talker):
    """Writes into the victim's file as soon as it is loaded."""

    @torch.jit.export
    def __getstate__(self) -> tuple[str, str, bool]:
        return self.description, self.victim, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, str, bool]) -> None:
        self.description = state[0]
        self.victim = state[1]
        self.training = state[2]
        assert int(torch.from_file(self.victim, shared=True, size=4, dtype=torch.uint8).fill_(33).sum()) > 0


class Victim:
    """A file of the user's; ``harmed`` says whether something has written into it."""

    def __init__(self, folder: Path) -> None:
        self.path = Path(folder) / "victim.txt"
        self.restore()

    def restore(self) -> None:
        self.path.write_text(MINE)

    @property
    def harmed(self) -> bool:
        return self.path.read_text() != MINE


def write_hostile(path: Path, victim: Victim, kind: type[Talker] = Waker, record: dict | None = None) -> None:
    """A model file that harms the victim; ``record``: of the extra file (none: only the attribute says it)."""
    extra = {} if record is None else {"ubmd.json": json.dumps(record).encode()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        module = torch.jit.script(kind(json.dumps(RECORD), str(victim.path)))
        torch.jit.save(module, str(path), _extra_files=extra)
    victim.restore()


def members(path: Path) -> dict[str, bytes]:
    """Members of an archive, by their full names."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}
