"""Who writes to a place: one process at a time, on shared file systems and across crashes."""
