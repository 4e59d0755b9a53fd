"""What holds for every test: a time limit; and hypothesis asks nothing that depends on how busy the machine is."""

from hypothesis import HealthCheck, settings

pytest_plugins = ["tests.deadline"]

settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")
