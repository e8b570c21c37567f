"""`python -m tokenweight`, as torchrun starts it."""

from tokenweight.cli import main

raise SystemExit(main())
