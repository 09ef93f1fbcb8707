"""Which heads and layers carry a behaviour, and whether another checkpoint does it the same way."""
