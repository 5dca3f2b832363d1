"""Calculators that cannot be imported or made: one sentence that names the file, the line or the package."""

import re
import sys
from pathlib import Path

import pytest

from ubmd.errors import SettingsError
from ubmd.references import make_calculator
from ubmd.settings import ReferenceSettings

FILES = {
    "needs.py": "import no_such_package.part",
    "needs_part.py": "import ase.calculators.no_such_part",
    "wrong_name.py": "from ase.calculators.emt import EMTT",
    "syntax.py": "x = 1\ny = (",
    "name.py": "import os\n\nundefined()",
    "leaves.py": "import sys\nsys.exit('no licence')",
    "by_hand.py": "raise ModuleNotFoundError('not on this machine')",
    "talkative.py": "raise RuntimeError('\\x1b[31mz\\n' * 1000000)",
    "code.py": "class Calc: pass",
    "fine.py": "from ase import Atoms\nX = 3\nclass Calc: pass\ndef late():\n    import no_such_package\n"
    "def leaving():\n    raise SystemExit('no licence')\n",
    "helped.py": "import no_such_helper",
    "zero.py": "x = 1\0",
    "package/inner.py": "class Calc: pass",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A settings folder with modules of the user; nothing of it stays imported."""
    (tmp_path / "package").mkdir()
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in [*FILES, "package", "package.inner"]:
        if name != "code.py":
            monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("calculator", "message"),
    [
        (
            "my_code:Calc",
            "there is no my_code.py in FOLDER, and no installed package of that name; check its spelling.",
        ),
        ("my_code.ase:Calc", "there is no my_code.py in FOLDER, and .*for example with: pip install my_code"),
        ("ase.calculators.emtt:EMT", "the package ase has no module ase.calculators.emtt; check its spelling."),
        ("ase.calculators.emt:EMTT", "the module ase.calculators.emt has no 'EMTT'; did you mean 'EMT'?"),
        ("package.outer:Calc", "the package package has no module package.outer; check its spelling."),
        ("needs:Calc", "No module named 'no_such_package' (FOLDER/needs.py, line 1); .*pip install no_such_package"),
        ("needs_part:Calc", "No module named 'ase.calculators.no_such_part' (FOLDER/needs_part.py, line 1)."),
        ("wrong_name:Calc", "ImportError: cannot import name 'EMTT' .* (FOLDER/wrong_name.py, line 1)."),
        ("syntax:Calc", "SyntaxError: '(' was never closed (FOLDER/syntax.py, line 2)."),
        ("name:Calc", "NameError: name 'undefined' is not defined (FOLDER/name.py, line 3)."),
        ("leaves:Calc", "SystemExit: no licence (FOLDER/leaves.py, line 2)."),
        ("by_hand:Calc", "ModuleNotFoundError: not on this machine (FOLDER/by_hand.py, line 1)."),
        ("code:Calc", "the module code has no 'Calc'; Python has its own module of this name .*: rename code.py."),
        ("fine:X", "is an object of type int; name a class or a function"),
        ("fine:Calc", "makes an object of type Calc, which is not an ASE calculator."),
        ("fine:Atoms", "makes an object of type Atoms, which is not an ASE calculator."),
        ("fine:late", "No module named 'no_such_package' (FOLDER/fine.py, line 5); .*pip install no_such_package"),
        ("fine:leaving", "don't suit the calculator 'fine:leaving': SystemExit: no licence"),
        ("fine.Calc", "nor an import path like 'ase.calculators.emt:EMT'; did you mean 'fine:Calc'?"),
        ("fine.py:Calc", "'fine.py:Calc' names a file, but a module is needed: write 'fine:Calc'."),
        ("./fine:Calc", "names a file, but a module is needed: write 'fine:Calc'."),
        ("package/inner.py:Calc", "names a file, but a module is needed: write 'package.inner:Calc'."),
        ("/elsewhere/own.py:Calc", "names a file, but a module is needed: put it into FOLDER and write 'own:Calc'."),
        (".fine:Calc", "'.fine:Calc' is not an import path; write it like 'ase.calculators.emt:EMT'."),
        ("fine:", "'fine:' is not an import path"),
        (" fine:Calc", "' fine:Calc' is not an import path"),
        ("package:Calc", "has no 'Calc'; FOLDER/package is a folder: name the module in it, perhaps package.inner."),
        (
            "helped:Calc",
            "no_such_helper' (FOLDER/helped.py, line 1); there is no no_such_helper.py in FOLDER either.*pip install",
        ),
        ("zero:Calc", "SyntaxError: source code string cannot contain null bytes."),
        ("package.inner:Calc", "makes an object of type Calc, which is not an ASE calculator."),
    ],
)
def test_one_sentence(calculator: str, message: str, folder: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        make_calculator(ReferenceSettings(calculator=calculator), folder)
    found = str(caught.value)
    assert re.search(".*".join(map(re.escape, message.replace("FOLDER", str(folder)).split(".*"))), found), found
    assert ("pip install" in found) == ("pip install" in message)  # no advice to install the user's own module


def test_long_messages_of_an_import_are_cut(folder: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        make_calculator(ReferenceSettings(calculator="talkative:Calc"), folder)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000
    assert str(caught.value).endswith(f"(cut: 7,000,000 characters) ({folder}/talkative.py, line 1).")


def test_a_folder_named_like_a_package_is_not_blamed_for_a_misspelt_class(folder: Path) -> None:
    (folder / "ase").mkdir()
    with pytest.raises(SettingsError, match=r"has no 'EMTT'; did you mean 'EMT'\?$"):
        make_calculator(ReferenceSettings(calculator="ase.calculators.emt:EMTT"), folder)
