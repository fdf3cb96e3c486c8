"""Other libraries' trainers: their types in, a Balancer at work."""
