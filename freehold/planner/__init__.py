"""The planner: memory, communication, time, money and failures of a training run, from its configuration alone."""
