"""Load balancing for mixture-of-experts training, exact for every way to cut a batch."""
