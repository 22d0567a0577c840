"""What more replicas than there are would do: the product's own decisions over simulated clocks."""
