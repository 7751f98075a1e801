"""The emoji pipeline: 195 objects in four styles."""
