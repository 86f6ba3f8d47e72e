"""What surrounds the routes: the limits of connections, and those of requests."""
