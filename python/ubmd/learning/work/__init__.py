"""Where tasks run: worker processes, executors of clusters, groups of tasks; and the tasks themselves."""
