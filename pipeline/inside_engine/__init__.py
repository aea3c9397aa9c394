"""What scripts import that run in an engine's own Python: of this project they see this folder and their own."""
