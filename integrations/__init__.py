"""Where hf_paged meets other projects, one module or folder each. None is imported unless asked for."""
