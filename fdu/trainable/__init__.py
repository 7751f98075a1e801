"""What is trained, a file a kind of method."""
