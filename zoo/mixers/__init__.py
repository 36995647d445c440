"""Sequence mixers, one architecture a file. See `docs/adding_a_mixer.md`."""
