"""What models cost: counted, compiled, timed."""
