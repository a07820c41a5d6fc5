"""``kvshare doctor``: what this machine lacks, and whether a whole job can train."""
