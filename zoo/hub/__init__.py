"""The Hub: publishing a model, taking one from there, and what is checked on both ways."""
