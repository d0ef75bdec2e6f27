"""Option files, and what is done by them: training, testing, checking, studies."""

import basicsr  # noqa: F401  first: once it is imported, it has all of ours registered
