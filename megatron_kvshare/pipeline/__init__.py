"""Pipeline stages: what travels between them, and the chunks that schedules run."""
