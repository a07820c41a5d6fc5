"""Who writes to a place (L1): one process at a time, on shared file systems and across crashes."""
