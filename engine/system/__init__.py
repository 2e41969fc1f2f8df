"""The machine around a run: command line, files, signals, processes, hardware, logging."""
