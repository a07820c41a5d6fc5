"""What several settings must fulfil together, and what the environment must offer."""
