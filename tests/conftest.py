"""What holds for every test: a time limit."""

pytest_plugins = ["tests.deadline"]
