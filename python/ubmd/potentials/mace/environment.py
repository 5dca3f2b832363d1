"""The Python that has MACE, as a subprocess of ubmd: nothing of MACE is imported here."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ubmd.errors import ModelError, SettingsError, TrainingError, UbmdError, one_line

INSIDE = Path(__file__).with_name("inside.py")
_POLL = 0.2  # s between looks at a process
# Of ubmd's own Python and its plugin: they would mislead another one.
_LEFT_OUT = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHONWARNINGS")


@dataclass(frozen=True)
class Environment:
    """An interpreter with the package mace."""

    python: Path

    def ask(self, command: str, **request: Any) -> dict[str, Any]:
        """Run one of the commands of `inside`, and return its answer.

        Raises:
            SettingsError: there is no such interpreter, or it has no MACE.
            ModelError: the checkpoint is not one that can be used.
        """
        with tempfile.TemporaryDirectory(prefix="ubmd-mace-") as folder:
            return self._run(command, request, Path(folder), None, ModelError)

    def train(self, arguments: list[str], threads: int, folder: Path, tick: Callable[[], None]) -> None:
        """Run mace_run_train; its output is in ``train.out`` and ``train.err`` of the folder.

        Args:
            arguments: of the command.
            threads: of torch.
            folder: for output, and working directory.
            tick: called several times per second; what it raises ends the training.

        Raises:
            SettingsError: as for `ask`.
            TrainingError: the command failed.
        """
        self._run("train", {"arguments": arguments, "threads": threads}, folder, tick, TrainingError)

    def _run(
        self,
        command: str,
        request: Mapping[str, Any],
        folder: Path,
        tick: Callable[[], None] | None,
        kind: type[UbmdError],
    ) -> dict[str, Any]:
        asked, answer = folder / f"{command}.request.json", folder / f"{command}.answer.json"
        asked.write_text(json.dumps(request), encoding="utf-8")
        answer.unlink(missing_ok=True)
        outputs = folder / f"{command}.out", folder / f"{command}.err"
        with self._process([command, str(asked), str(answer)], folder, outputs) as process:
            while process.poll() is None:
                if tick is not None:
                    tick()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL)
        if process.returncode or not answer.exists():
            raise self._failed(command, process.returncode, outputs[1], kind)
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        if "error" in found:
            raise ModelError(f"{request.get('checkpoint', 'The network')} cannot be used: {found['error']}.")
        return found

    @contextmanager
    def _process(self, arguments: list[str], folder: Path, outputs: tuple[Path, Path]) -> Iterator[Any]:
        """The process, in a session of its own; it, and what it has started, end with this block and with ubmd."""
        environment = {name: value for name, value in os.environ.items() if name not in _LEFT_OUT}
        with outputs[0].open("w") as out, outputs[1].open("w") as err:
            try:
                process = subprocess.Popen(
                    [str(self.python), str(INSIDE), *arguments],
                    stdin=subprocess.PIPE,  # it ends when this is closed
                    stdout=out,
                    stderr=err,
                    cwd=folder,
                    env=environment,
                    start_new_session=True,
                )
            except OSError as error:
                raise SettingsError(
                    f"model.python: {self.python} cannot be started ({(error.strerror or str(error)).lower()})."
                ) from None
            try:
                yield process
            finally:
                if process.poll() is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                assert process.stdin is not None
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()

    def _failed(self, command: str, code: int, file: Path, kind: type[UbmdError]) -> UbmdError:
        """What to say of a process that has failed: the last line that it wrote to stderr."""
        last = last_line(file)
        for package in ("mace", "e3nn", "torch", "ase"):
            if f"No module named '{package}" in last:
                return SettingsError(
                    f"model.python: {self.python} has no package {package}; make an environment for MACE with: "
                    "python -m venv mace-env && mace-env/bin/pip install mace-torch."
                )
        how = f"with exit status {code}" if code >= 0 else f"by signal {-code}"
        where = f" (all of it is in {file})" if kind is TrainingError else ""
        what = "mace_run_train" if command == "train" else f"The conversion by MACE ({command})"
        return kind(f"{what} in {self.python} ended {how}: {one_line(last) or 'without a word'}{where}")


def last_line(file: Path) -> str:
    """The last line that is not empty."""
    try:
        lines = [line for line in file.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    return lines[-1].strip() if lines else ""
