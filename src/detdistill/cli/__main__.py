"""`python -m detdistill.cli` is `detdistill`."""

from detdistill.cli import main

main()
