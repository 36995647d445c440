"""Other people's checkpoints: one file a layout, which knows its names, shapes and conventions."""
