"""CEAModel, which BasicSR's pipelines train and validate."""

import basicsr  # noqa: F401  first: once it is imported, it has all of ours registered
