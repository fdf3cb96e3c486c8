"""What a run is: its settings, where they are read from, and the balancing strategies by name."""
