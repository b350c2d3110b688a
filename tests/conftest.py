"""Settings of the whole suite."""


def pytest_configure(config):
    # torch says so at its first import; the five packages do without numpy
    config.addinivalue_line("filterwarnings", "ignore:Failed to initialize NumPy")
