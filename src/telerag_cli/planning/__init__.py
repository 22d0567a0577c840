"""What a machine was measured to do, and what follows from it: pure functions of a profile."""
