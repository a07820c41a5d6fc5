"""Operations that a GPU runs as few kernels: each in one file, with its form for every device."""
