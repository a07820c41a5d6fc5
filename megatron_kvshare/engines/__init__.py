"""Engines: what trains the stages of a rank, behind one protocol."""
