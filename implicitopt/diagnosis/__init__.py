"""What `implicitopt.check` looks at, finds and reports."""
