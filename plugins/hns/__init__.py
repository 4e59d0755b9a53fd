"""HiSilicon SEC2, HPRE and ZIP accelerators."""
