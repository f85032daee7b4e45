"""What keeps a run inside the memory it has."""
