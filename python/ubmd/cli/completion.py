"""What the shell offers for ``--set`` when Tab is pressed."""

from __future__ import annotations

from ubmd.settings import RunSettings, Table, TrainSettings, UncertaintySettings
from ubmd.settings.table import tables_of


def keys(kind: type[Table], prefix: str = "") -> list[str]:
    """Dotted keys of all settings, without tables."""
    found = []
    for name, field in kind.model_fields.items():
        tables = tables_of(field.annotation)
        found += keys(tables[0], f"{prefix}{name}.") if tables else [prefix + name]
    return found


def keys_of_runs(incomplete: str) -> list[str]:
    """Keys of `ubmd run` and `ubmd check`, of both schedules, that begin as typed."""
    from ubmd.settings.dynamic import DynamicRunSettings

    return _fitting([*keys(RunSettings), *keys(DynamicRunSettings)], incomplete)


def keys_of_training(incomplete: str) -> list[str]:
    """Keys of `ubmd train` and `ubmd calibration`."""
    return _fitting(keys(TrainSettings), incomplete)


def keys_of_export(incomplete: str) -> list[str]:
    """Keys of `ubmd export`."""
    return _fitting(keys(UncertaintySettings), incomplete)


def _fitting(names: list[str], incomplete: str) -> list[str]:
    return [f"{name}=" for name in dict.fromkeys(names) if name.startswith(incomplete)]
