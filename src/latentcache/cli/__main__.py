"""`python -m latentcache.cli`, for where no script was installed."""

from latentcache.cli import main

main()
