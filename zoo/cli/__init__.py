"""The command line, one file a command. Heavy imports are inside the commands, so that `zoo --help` is instant."""
