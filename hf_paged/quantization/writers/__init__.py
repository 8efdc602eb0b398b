"""From a model to a quantised checkpoint: what weights become, and the folder that they are written to."""
