"""Run the command line as `python -m latentcache.cli`, if no script is installed."""

from latentcache.cli import main

main()
