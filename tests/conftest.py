"""What holds for every test."""

from hypothesis import HealthCheck, settings

# How long an example takes, to draw or to run, tells how busy the machine is and nothing of the code.
settings.register_profile("any-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any-machine")
