"""python -m graceful.flows.cli"""

from graceful.flows.cli import main

main()
