"""What serving costs: the largest batch of a memory budget, its speed, and the bound of both."""
