"""One literal a family."""
