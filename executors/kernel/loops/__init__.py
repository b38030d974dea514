"""The training loops: one engine; a method is its batch builder and its loss."""
