"""More than one process, or machine: Ray, and what runs on it. Ray is an extra, imported only inside functions."""
