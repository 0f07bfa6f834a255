"""HTTPS: certificates of the box, and how its own commands recognise it."""
