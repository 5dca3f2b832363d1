"""Run folders: where everything of a run is, and what has been done with which inputs."""
