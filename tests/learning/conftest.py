"""Models that several files of this folder run replicas with."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file of the copper and gold cluster."""
    from replicas import train_cluster_model

    return train_cluster_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def crystal_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file of strained and shaken copper that knows stresses."""
    from replicas import train_crystal_model

    return train_crystal_model(tmp_path_factory.mktemp("crystal_model"))
