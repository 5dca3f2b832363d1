"""MACE networks: trained by their own command, and converted to TorchScript, in a Python of their own."""
