"""What networks of any widths cost on a target, before anything is trained; masks that meet budgets which are measured."""
