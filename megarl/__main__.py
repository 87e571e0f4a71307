"""`python -m megarl` is the `megarl` command."""

from megarl.cli import main

raise SystemExit(main())
