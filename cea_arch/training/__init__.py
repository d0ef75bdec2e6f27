"""Option files, and what is done by them: training, testing, checking, studies."""
