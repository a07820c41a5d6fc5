"""Maps, plans and stages as text for people."""
