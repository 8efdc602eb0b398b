"""`hf-paged bench`: the engine and its peers on the same work in the same process."""
