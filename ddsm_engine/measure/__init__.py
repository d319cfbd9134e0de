"""How milliseconds are measured, everywhere in the project."""
