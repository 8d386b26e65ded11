"""Speed as the goal of a pruning: a few widths are timed, and the least sparsity that is fast enough is chosen."""
