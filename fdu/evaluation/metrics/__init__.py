"""What is measured beside the judges' shares, a file for each metric."""
