"""The metrics besides the judges' shares, one file per metric."""
