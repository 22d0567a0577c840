"""The ``cuda`` link: the index in host memory, an arena on a GPU, PCIe between. Only here is torch known."""
