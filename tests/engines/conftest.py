"""What runs inside an engine's process is no test module: it imports the engine."""

collect_ignore_glob = ["*/record*.py", "*/stub/*"]
