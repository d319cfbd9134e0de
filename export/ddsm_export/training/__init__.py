"""Training a supernet with the sandwich rule."""
