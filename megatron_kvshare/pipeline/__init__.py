"""Pipeline stages (L4): what travels between them, and the chunks that schedules run."""
