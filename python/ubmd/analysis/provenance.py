"""Where a run comes from: versions, machine, seeds, hashes, and the settings that are not defaults."""

from __future__ import annotations

import json
from typing import Any

from ubmd.analysis.document import Document
from ubmd.files import file_hash
from ubmd.runs.folder import RunFolder
from ubmd.settings import ModelSettings, Table
from ubmd.settings.potentials import keys_without_effect

_FILES = ("dataset", "test", "model")


def provenance_rows(folder: RunFolder) -> list[list[str]]:
    """(what, value) of a run: manifest, and hashes of what it has made so far."""
    manifest = folder.read_manifest()
    calculator = str(manifest["settings"]["reference"]["calculator"])
    # Runs of earlier versions list OpenMM whatever their reference is.
    found = {name: known for name, known in manifest["packages"].items() if name != "openmm" or "openmm" in calculator}
    machine = manifest["machine"]
    rows = [
        ["started", manifest["created"]],
        ["ubmd", manifest["ubmd"]],
        ["python", manifest["python"]],
        ["packages", _versions(found)],
        *_reference_rows(calculator, manifest.get("reference") or {}),
        *_file_rows(manifest.get("backend", {})),
        ["machine", ", ".join(f"{value} {key}" if key == "cores" else str(value) for key, value in machine.items())],
        ["seed", f"{manifest['seed']}; {manifest['seeds']}"],
        ["threads of the training", str(manifest["threads"])],
        *([f"SHA-256 of {name}", value] for name, value in manifest["inputs"].items()),
    ]
    for phase in manifest.get("phases", []):
        rows.append([f"settings from iteration {phase['from']}", _changes(manifest["settings"], phase["settings"])])
    for name in _FILES:
        path = getattr(folder, name)
        if path.exists():
            rows.append([f"SHA-256 of {path.name}", file_hash(path)])
    return rows


def _reference_rows(calculator: str, record: dict[str, Any]) -> list[list[str]]:
    """The reference calculator; runs of earlier versions recorded its name only."""
    parts = [calculator, _versions(record.get("packages", {}))]
    parts += [f"model {record['model']}"] if record.get("model") else []
    parts += [path if path.endswith(name) else f"{name} {path}" for name, path in record.get("programs", {}).items()]
    rows = [["reference calculator", "; ".join(part for part in parts if part)]]
    rows += _file_rows(record)
    if record.get("unrecognised"):
        rows.append(["arguments not in the signature of the calculator", ", ".join(record["unrecognised"])])
    return rows


def _file_rows(record: dict[str, Any]) -> list[list[str]]:
    return [[f"SHA-256 of {name}", value] for name, value in record.get("files", {}).items()]


def _versions(packages: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {version}" for name, version in packages.items() if version)


def _changes(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> str:
    """Settings of a later phase that are not those of the first."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found.append(_changes(before, after, f"{prefix}{key}."))
        elif before != after:
            found.append(f"{prefix}{key} = {_shown(after)}")
    return ", ".join(text for text in found if text)


def changed_settings(settings: Table) -> list[list[str]]:
    """(key, value, default) of every setting that is not its default."""
    return [
        [key, _shown(value), "(none)" if default is _REQUIRED else _shown(default)]
        for key, value, default in _pairs(settings, "")
        if default is _REQUIRED or value != default
    ]


def add_provenance(report: Document, folder: RunFolder, settings: Table) -> None:
    """Sections with changed settings, all settings, and where they come from."""
    section = report.section("Settings that are not defaults")
    section.table(["key", "value", "default"], changed_settings(settings))
    section = report.section("All settings", folded=True)
    section.table(["key", "value"], [list(pair) for pair in setting_texts(settings).items()])
    section = report.section("Provenance")
    section.table(["what", "value"], provenance_rows(folder))
    section.text("The same settings, seed, versions and number of threads repeat the run on the same kind of machine.")


def setting_texts(settings: Table) -> dict[str, str]:
    """Dotted key -> value as text, of every setting but those that this kind of network does not use."""
    model = getattr(settings, "model", None)
    unused = keys_without_effect(model.kind) if isinstance(model, ModelSettings) else frozenset()
    return {key: _shown(value) for key, value, _ in _pairs(settings, "") if key not in unused}


_REQUIRED = object()


def _pairs(table: Table, prefix: str) -> list[tuple[str, Any, Any]]:
    """(dotted key, value, default) of a table and those inside it."""
    pairs: list[tuple[str, Any, Any]] = []
    for name, field in type(table).model_fields.items():
        value = getattr(table, name)
        if isinstance(value, Table):
            pairs += _pairs(value, f"{prefix}{name}.")
        else:
            default = _REQUIRED if field.is_required() else field.get_default(call_default_factory=True)
            pairs.append((prefix + name, value, default))
    return pairs


def _shown(value: Any) -> str:
    """A value as one would write it in the settings file."""
    if value is None:
        return "not set"
    return "inf" if value == float("inf") else json.dumps(value, default=str, ensure_ascii=False)
