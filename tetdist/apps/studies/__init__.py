"""Studies: several runs that answer a question, on this machine or a cluster, and their report."""
