"""Looking at the engine from outside."""
