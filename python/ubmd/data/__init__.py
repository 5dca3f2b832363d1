"""Structures and their labels in files, and the graphs that models see."""
