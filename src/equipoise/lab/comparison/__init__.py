"""Several runs side by side: a queue of training processes, and what a terminal shows of them."""
