"""What runs inside a router's forward and backward: what is measured there, and the gradient that is attached."""
