"""The planner of pipeline stages: who holds which layers, runs which part of a sweep when, and
sends what."""
