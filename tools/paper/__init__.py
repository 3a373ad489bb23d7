"""The paper's tables and the model zoo; run from the repository: ``python -m tools.paper.tables``."""
