"""Training of a potential: from scratch, from an earlier model, or resumed after a kill."""

from ubmd.training.checkpoint import load_weights, save_weights
from ubmd.training.members import member_folders, train_members
from ubmd.training.trainer import TrainedModel, split, train

__all__ = ["TrainedModel", "load_weights", "member_folders", "save_weights", "split", "train", "train_members"]
