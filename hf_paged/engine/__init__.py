"""The engine: requests in, tokens out. `request` and `scheduler` know no torch; `engine` joins them to the model."""
