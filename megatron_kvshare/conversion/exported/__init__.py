"""The two files that travel with exports; nothing here imports the package."""
