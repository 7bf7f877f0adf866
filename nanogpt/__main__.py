"""`python -m nanogpt VERB` is `nanogpt VERB` for those who have not installed the package."""

from nanogpt.cli import main

main()
