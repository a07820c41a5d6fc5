"""OpenAI's HTTP interface to the engine: requests, answers, limits, and an orderly end."""
